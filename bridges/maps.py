"""Bridges: linear maps between the residual streams of a dense model and of its sparse student [G 2.3, A.3].

At each of the 2L+1 residual sites an encoder f_i takes the dense stream to the sparse one, a linear map with bias and
then AbsTopK; a decoder g_i takes the sparse stream to the dense one, a linear map with bias.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from distill.artifact import ArtifactError, load_tensors, save_tensors
from distill.model.operations import linear, linear_topk
from distill.model.sites import residual_sites, site_index

FILE = "bridges.safetensors"
_KIND = "bridges"


@dataclass(frozen=True, kw_only=True)
class BridgeShape:
    """The numbers that a set of bridges is built from."""

    n_layer: int
    """Layers of both models (L); there are 2L+1 sites."""
    d_dense: int
    """Width of the dense residual stream, in channels (D)."""
    d_sparse: int
    """Width of the student's residual stream, in channels (S)."""
    k: int
    """Channels that an encoder leaves non-zero per token; S switches its AbsTopK off."""

    def __post_init__(self) -> None:
        for name in ("n_layer", "d_dense", "d_sparse"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed are 1 and more")
        if not 1 <= self.k <= self.d_sparse:
            raise ValueError(f"k: got {self.k}, allowed are 1 to {self.d_sparse} (d_sparse: AbsTopK off)")


class Bridges(nn.Module):
    """An encoder f_i and a decoder g_i per residual site, which are addressed by the site's name."""

    def __init__(self, shape: BridgeShape, *, seed: int = 0) -> None:
        """Weights are Gaussian with variance 1 / (channels read), drawn from a generator of that seed; biases are 0."""
        super().__init__()
        self.shape = shape
        self.sites = residual_sites(shape.n_layer)
        generator = torch.Generator().manual_seed(seed)
        self.encoders = nn.ModuleList(_linear(shape.d_dense, shape.d_sparse, generator) for _ in self.sites)
        self.decoders = nn.ModuleList(_linear(shape.d_sparse, shape.d_dense, generator) for _ in self.sites)

    @classmethod
    def identity(cls, n_layer: int, width: int) -> "Bridges":
        """Bridges between two streams of equal width that change nothing, AbsTopK off."""
        bridges = cls(BridgeShape(n_layer=n_layer, d_dense=width, d_sparse=width, k=width))
        with torch.no_grad():
            for site in bridges.sites:
                for linear in (bridges.encoder(site), bridges.decoder(site)):
                    nn.init.eye_(linear.weight)
        return bridges

    def encoder(self, site: str) -> nn.Linear:
        """The linear part of f_i, weight (S, D). Raises `ValueError` for a site that is not there."""
        return self._at(self.encoders, site)

    def decoder(self, site: str) -> nn.Linear:
        """g_i, weight (D, S). Raises `ValueError` for a site that is not there."""
        return self._at(self.decoders, site)

    def _at(self, maps: nn.ModuleList, site: str) -> nn.Linear:
        linear = maps[site_index(site, self.shape.n_layer, field="site")]
        assert isinstance(linear, nn.Linear)
        return linear

    def encode(self, site: str, h_d: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows S"]:
        """f_i: the student's residual stream at `site` as told by the dense one, `k` channels of it non-zero."""
        encoder = self.encoder(site)
        keep = None if self.shape.k == self.shape.d_sparse else self.shape.k
        return linear_topk(h_d.to(encoder.weight.dtype), [(encoder.weight, encoder.bias)], keep=[keep])[0]

    def decode(self, site: str, h_s: Float[Tensor, "*rows S"]) -> Float[Tensor, "*rows D"]:
        """g_i: the dense residual stream at `site` as told by the student's."""
        decoder = self.decoder(site)
        return linear(h_s.to(decoder.weight.dtype), decoder.weight, decoder.bias)

    def decoder_matrix(self, site: str) -> Float[Tensor, "D S"]:
        """G_i, the linear part of g_i, detached: column c is what one unit of channel c adds to the dense stream."""
        return self.decoder(site).weight.detach()

    def save(self, folder: str | Path) -> None:
        """Writes `bridges.safetensors`, the shape in its head, into `folder` (made where it is missing)."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        tensors = {
            f"{side}/{site}/{name}": value
            for side, maps in (("encode", self.encoders), ("decode", self.decoders))
            for site, linear in zip(self.sites, maps, strict=True)
            for name, value in linear.state_dict().items()
        }
        save_tensors(Path(folder) / FILE, tensors, {"kind": _KIND, "shape": asdict(self.shape)})

    @classmethod
    def load(cls, folder: str | Path) -> "Bridges":
        """Reads what `save` wrote, onto the CPU. Raises `ArtifactError` for anything else."""
        path = Path(folder) / FILE
        tensors, head = load_tensors(path, kind=_KIND)
        try:
            shape = BridgeShape(**head["shape"])
            _check_stored(shape, tensors)
            bridges = cls(shape)
            for side, maps in (("encode", bridges.encoders), ("decode", bridges.decoders)):
                for site, linear in zip(bridges.sites, maps, strict=True):
                    linear.load_state_dict({name: tensors[f"{side}/{site}/{name}"] for name in ("weight", "bias")})
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path}: its tensors and its shape are not those of bridges: {error}") from None
        return bridges


def _check_stored(shape: BridgeShape, tensors: Mapping[str, Tensor]) -> None:
    """`ValueError` where tensors are not those of bridges of this shape; makes nothing of the size that it says."""
    for name, value in asdict(shape).items():
        if type(value) is not int:
            raise ValueError(f"{name}: got {value!r}, allowed are whole numbers")
    if len(tensors) != 4 * (2 * shape.n_layer + 1):
        raise ValueError(f"n_layer: got {shape.n_layer}, but {len(tensors)} tensors; allowed are 4 a site, 2L+1 sites")
    for site in residual_sites(shape.n_layer):
        for side, n_in, n_out in (("encode", shape.d_dense, shape.d_sparse), ("decode", shape.d_sparse, shape.d_dense)):
            for name, wanted in (("weight", (n_out, n_in)), ("bias", (n_out,))):
                found = tensors[f"{side}/{site}/{name}"]
                if found.shape != wanted or not found.is_floating_point():
                    raise ValueError(f"{side}/{site}/{name}: {found.dtype} {tuple(found.shape)}, allowed is {wanted}")


def _linear(n_in: int, n_out: int, generator: torch.Generator) -> nn.Linear:
    # Through the meta device, so that torch's global generator is left alone.
    linear = nn.Linear(n_in, n_out, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        linear.weight.copy_(torch.randn(n_out, n_in, generator=generator) * n_in**-0.5)
        linear.bias.zero_()
    return linear


def check_bridges(bridges: Bridges, *, n_layer: int, d_dense: int, d_sparse: int) -> None:
    """`ValueError` where the bridges were made for models of other depth or widths."""
    wanted: Sequence[tuple[str, int]] = (("n_layer", n_layer), ("d_dense", d_dense), ("d_sparse", d_sparse))
    for name, value in wanted:
        if getattr(bridges.shape, name) != value:
            raise ValueError(f"{name}: the bridges are for {getattr(bridges.shape, name)}, the models have {value}")
