"""Multi-head self-attention: the paper's form (logits s·q·k/d, rotary positions, output times 1/3, no biases) and the forms of other models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from robustlip.errors import BadInput


def rotary(x: torch.Tensor, base: float = 10_000.0, position: torch.Tensor | None = None) -> torch.Tensor:
    """Rotate pairs of coordinates of x (..., T, d) by angles that grow with the position: an orthogonal map of each token.

    position: 0, 1, … T − 1 unless given, (T,) or (…, T) against x; the transpose of the map is the one at −position.
    Source: Su et al. 2021, RoFormer, equation 34, in the half-split layout. d must be even.
    """
    width = x.shape[-1]
    if position is None:
        position = torch.arange(x.shape[-2], device=x.device)
    # Angles in float64, whatever x is: a float32 angle at position 255 would be wrong by 1e-5.
    frequency = base ** (-torch.arange(0, width, 2, dtype=torch.float64, device=x.device) / width)
    angle = position.double().unsqueeze(-1) * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., : width // 2], x[..., width // 2 :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


# A number of a mask from which on a token is not seen: e to such a number is 0 in every dtype, whatever logits of less than half of it are added.
UNSEEN = -1e30
# cos² + sin² of a table differs from 1 by no more than two roundings to bfloat16.
_OF_A_CIRCLE = 2.0**-6


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """(x₁, x₂) → (−x₂, x₁), halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


class Attention(nn.Module):
    """x (N, T, D) → output_scale · (W_o · concat_h softmax(scale · q_h k_hᵀ / d) v_h + b_o), of shape (N, T, D); q = W_q x + b_q, and so k and v.

    width D, heads H, head width d = D/H (even when rotary). scale s: the paper has s = 1; s = √d is the usual 1/√d attention.
    causal: token i sees tokens j ≤ i only (True unless there is a mask). output_scale: the paper's 1/3 (1 where there is no output projection).
    distance_bias M > 0 adds a learned b[h, min(|i − j|, M − 1)] to the logits (Press et al. 2022, ALiBi, with its slopes as the start).
    It does not depend on the input, so heads can look at near tokens without any cost in the Lipschitz bound. 0 is the paper's layer.
    distance_peaks p > 0 starts it from −p·||i − j| − h − 1| instead, head h at the token h + 1 after: heads that start at their own token stay.
    Source: Newhouse et al. 2025, section 3.

    The forms of other models, all by keyword. With none of them the layer is the paper's.
    head_width: d of queries, keys and values, where it is not D/H. key_heads: Hk heads of keys and values, each for H/Hk heads of queries in a row
    (Ainslie et al. 2023). biases: of query, key, value, output. joined: one Linear `projection`, D → (H + 2·Hk)·d, its rows those of queries, keys
    and values, each head by head, in the place of three; biases[0] is its bias. logit_scale: the number that multiplies q·k, in the place of scale/d.
    mask: what a token sees, in the place of causal, broadcastable to (H, T, T): bool (True: seen), or numbers that are added to the logits, of which
    −inf and all up to −1e30 say: not seen. angles: tables (cos, sin), (T, d) or (1, T, d), in the place of rope: q·cos + rotate_half(q)·sin. Either
    fixes the number of tokens.
    explicit: the kernel. None: F.scaled_dot_product_attention; else softmax(logits + mask) @ v with logits (q @ kᵀ)·logit_scale ('logits'),
    (q·logit_scale) @ kᵀ ('query'), or (q @ kᵀ)/divisor ('divide'). divisor: divides in the place of logit_scale ('query' and 'divide').
    mask_fill: the mask fills logits with −inf instead of being added, as one of bools always does. output False: the heads side by side are the
    output, (N, T, H·d).
    """

    # Buffers that may hold −inf.
    may_hide: ClassVar[tuple[str, ...]] = ("mask",)

    output: nn.Linear | None
    mask: torch.Tensor | None
    cos: torch.Tensor | None
    sin: torch.Tensor | None

    def __init__(
        self,
        width: int,
        heads: int,
        *,
        scale: float = 1.0,
        causal: bool | None = None,
        rope: bool | None = None,
        output_scale: float | None = None,
        distance_bias: int = 0,
        distance_peaks: float = 0.0,
        head_width: int | None = None,
        key_heads: int | None = None,
        biases: Sequence[bool] = (False, False, False, False),
        joined: bool = False,
        logit_scale: float | None = None,
        mask: torch.Tensor | None = None,
        angles: tuple[torch.Tensor, torch.Tensor] | None = None,
        explicit: str | None = None,
        divisor: float | None = None,
        mask_fill: bool = False,
        output: bool = True,
    ) -> None:
        super().__init__()
        if heads < 1 or (head_width is None and width % heads):
            raise BadInput(f"expected a width divisible by the number of heads, got width {width} and {heads} heads; change one of them")
        if head_width is not None and head_width < 1:
            raise BadInput(f"expected heads of at least one number, got head_width {head_width}; leave it out for width / heads")
        d = width // heads if head_width is None else head_width
        shared = heads if key_heads is None else key_heads
        if shared < 1 or heads % shared:
            raise BadInput(f"expected key_heads that divide the {heads} heads, got {shared}; each serves as many heads of queries in a row")
        if rope is None:
            rope = angles is None
        if causal is None:
            causal = mask is None and explicit is None
        if output_scale is None:
            output_scale = 1 / 3 if output else 1.0
        if (rope or angles is not None) and d % 2:
            raise BadInput(f"expected an even head width with rotary positions, got {d}; use fewer heads or rope=False")
        if not scale > 0:
            raise BadInput(f"expected an attention scale above 0, got {scale}; the paper uses 1")
        if not (math.isfinite(distance_peaks) and distance_peaks >= 0) or (distance_peaks and not distance_bias):
            raise BadInput(f"expected distance_peaks of at least 0, with a distance_bias, got {distance_peaks}; 2 is sharp, 0 leaves the slopes")
        biases = tuple(bool(b) for b in biases)
        if len(biases) != 4 or (joined and biases[1:3] not in ((False, False), (biases[0], biases[0]))):
            raise BadInput(f"expected biases of query, key, value and output, a joined projection's the first for all three, got {biases}; give four")
        if explicit not in (None, "logits", "query", "divide"):
            raise BadInput(f"expected explicit 'logits', 'query', 'divide' or None, got {explicit!r}; name one of them")
        for name, value in (("logit_scale", logit_scale), ("divisor", divisor)):
            if value is not None and not 1e-30 <= value <= 1e30:
                raise BadInput(f"expected a {name} between 1e-30 and 1e30, got {value}; scale the weights of queries instead")
        if (explicit == "divide") > (divisor is not None) or (divisor is not None) > (explicit in ("query", "divide")):
            raise BadInput(f"expected a divisor with explicit 'divide', or 'query' at will, got {divisor} with {explicit!r}; give it there alone")
        if sum((scale != 1.0, logit_scale is not None, divisor is not None)) > 1:
            raise BadInput(f"expected one of scale, logit_scale, divisor, got {scale}, {logit_scale}, {divisor}; leave out the others")
        if rope and angles is not None:
            raise BadInput("expected tables of angles in the place of rope, got both; leave rope out")
        if causal and (mask is not None or explicit is not None):
            raise BadInput("expected what an explicit or masked attention sees in its mask, got causal=True too; put it into the mask")
        if distance_bias and (mask is not None or explicit is not None):
            raise BadInput("expected a distance_bias without a mask and without an explicit kernel, got both; add it to the mask")
        if mask_fill and (mask is None or explicit is None):
            raise BadInput("expected mask_fill with a mask of an explicit kernel, got one without; leave it out")
        if not output and (output_scale != 1.0 or biases[3]):
            raise BadInput(f"expected no output_scale and no bias without an output projection, got {output_scale}, {biases[3]}; leave them out")
        self.width, self.heads, self.head_width, self.key_heads, self.biases = width, heads, d, shared, biases
        self.scale, self.causal, self.rope, self.output_scale = float(scale), causal, rope, float(output_scale)
        self.explicit, self.divisor, self.mask_fill = explicit, None if divisor is None else float(divisor), mask_fill
        self.stated_scale = None if logit_scale is None else float(logit_scale)
        self.joined = joined
        if joined:
            self.projection = nn.Linear(width, (heads + 2 * shared) * d, bias=biases[0])
        else:
            self.query = nn.Linear(width, heads * d, bias=biases[0])
            self.key = nn.Linear(width, shared * d, bias=biases[1])
            self.value = nn.Linear(width, shared * d, bias=biases[2])
        self.output = nn.Linear(heads * d, width, bias=biases[3]) if output else None
        self.distance_bias: nn.Parameter | None = None
        if distance_bias:
            head, distance = torch.arange(heads, dtype=torch.float32)[:, None], torch.arange(distance_bias)
            self.distance_bias = nn.Parameter(-distance_peaks * (distance - head - 1).abs() if distance_peaks else -(2.0**-head) * distance)
        cos, sin = (None, None) if angles is None else (self._table(angles[0]), self._table(angles[1]))
        for name, table in (("mask", mask), ("cos", cos), ("sin", sin)):
            self.register_buffer(name, None if table is None else table.detach().clone())
        if mask is not None:
            self._check_mask()
        if angles is not None:
            self.turn()
        if self.cos is not None and self.mask is not None:
            self.check_length(len(self.cos))

    # ---- what rules read: the one place that knows where matrices, masks and tables are

    @property
    def logit_scale(self) -> float:
        """The factor of q·k."""
        if self.divisor is not None:
            return 1 / self.divisor
        return self.scale / self.head_width if self.stated_scale is None else self.stated_scale

    @property
    def out_width(self) -> int:
        """The width of a token after the layer."""
        return self.heads * self.head_width if self.output is None else self.width

    @property
    def is_papers(self) -> bool:
        """Whether the layer has the paper's form: four separate square matrices, no biases, and a computed mask and angles."""
        plain = self.head_width * self.heads == self.width and self.key_heads == self.heads and not any(self.biases) and not self.joined
        usual = self.mask is None and self.cos is None and self.explicit is None and self.stated_scale is None and self.output is not None
        return plain and usual

    @property
    def looks_back(self) -> bool:
        """Whether the layer is causal: no token sees a later one."""
        return self.causal or (self.mask is not None and not bool(self.seen(self.mask.shape[-1]).triu(1).any()))

    @property
    def turns(self) -> bool:
        """Whether queries and keys are rotated."""
        return self.rope or self.cos is not None

    def projections(self) -> dict[str, nn.Linear]:
        """The Linear layers inside, by name: query, key and value or projection, and output where there is one."""
        inner: dict[str, nn.Linear] = {"projection": self.projection} if self.joined else {"query": self.query, "key": self.key, "value": self.value}
        return inner if self.output is None else inner | {"output": self.output}

    def holders(self) -> dict[str, nn.Linear]:
        """The Linear layer that holds the matrix of query, key, value and output (if there is an output projection)."""
        found = self.projections()
        return {name: found.get(name, found.get("projection", self.output)) for name in self._names()}  # type: ignore[misc]

    def _names(self) -> tuple[str, ...]:
        return ("query", "key", "value") if self.output is None else ("query", "key", "value", "output")

    def _rows(self) -> list[int]:
        """The numbers of rows of a joined projection for queries, keys and values."""
        return [heads * self.head_width for heads in (self.heads, self.key_heads, self.key_heads)]

    def matrices(self) -> dict[str, torch.Tensor]:
        """The present weights: query (H·d, D), key and value (Hk·d, D), and output (D, H·d) if there is one."""
        found = {name: linear.weight for name, linear in self.projections().items()}
        if self.joined:
            found = dict(zip(self._names()[:3], found["projection"].split(self._rows()), strict=True)) | found
        return {name: found[name] for name in self._names()}

    def offsets(self) -> dict[str, torch.Tensor | None]:
        """The biases of the same matrices, None without biases."""
        found: dict[str, torch.Tensor | None] = {name: linear.bias for name, linear in self.projections().items()}
        if self.joined:
            joined = found["projection"]
            parts = (None, None, None) if joined is None else joined.split(self._rows())
            found = dict(zip(self._names()[:3], parts, strict=True)) | found
        return {name: found[name] for name in self._names()}

    def check_length(self, length: int) -> None:
        """Raises BadInput if the number of tokens does not fit the mask and tables."""
        fixed = self.mask.shape[-1] if self.mask is not None else length if self.cos is None else len(self.cos)
        if self.cos is not None and len(self.cos) != fixed:
            raise BadInput(f"expected tables of angles of as many tokens as the mask's {fixed}, got {len(self.cos)}; make both of one length")
        if length != fixed:
            raise BadInput(f"expected {fixed} tokens, as Attention's mask or tables of angles have, got {length}; give sequences of that length")

    def seen(self, length: int) -> torch.Tensor:
        """The attention mask: which tokens j query i sees, bool (T, T), or (H, T, T) if heads differ. Raises BadInput where a token sees none."""
        self.check_length(length)
        if self.mask is None:
            everything = torch.ones(length, length, dtype=torch.bool, device=next(self.parameters()).device)
            return everything.tril() if self.causal else everything
        mask = self._mask_by_head()
        seen = mask if mask.dtype == torch.bool else mask > UNSEEN
        if not bool(seen.any(-1).all()):
            raise BadInput("expected a mask in which every token sees one, got rows of nothing, which have no softmax; let them see themselves")
        return seen

    def added(self, length: int) -> torch.Tensor | None:
        """The constant added to visible logits: (T, T) or (H, T, T), 0 at hidden ones; None where nothing is added."""
        if self.distance_bias is not None:
            position = torch.arange(length, device=self.distance_bias.device)
            return self.distance_bias[:, (position[:, None] - position[None, :]).abs().clamp_max(self.distance_bias.shape[1] - 1)]
        if self.mask is None or self.mask.dtype == torch.bool:
            return None
        return self._mask_by_head().masked_fill(~self.seen(length), 0.0)

    def depth(self) -> float:
        """How far hidden logits are below 0 at least: infinity, or the absolute value of the number that the mask adds."""
        if self.mask is None or self.mask.dtype == torch.bool or self.mask_fill:
            return math.inf
        return float((-self.mask.double()).masked_fill(self.mask > UNSEEN, torch.inf).amin())

    def turn(self) -> float:
        """ρ with ‖Rx‖ ≤ ρ‖x‖ for the rotations R of all tokens, and ‖RᵀR − I‖ ≤ ρ² − 1: 1, or what tables exceed it by.

        Raises BadInput for tables that are no rotations.
        """
        if self.cos is None or self.sin is None:
            return 1.0
        cos, sin, half = self.cos.double(), self.sin.double(), self.cos.shape[-1] // 2
        off = float((cos.square() + sin.square() - 1).abs().amax())
        same = all(torch.equal(table[:, :half], table[:, half:]) for table in (cos, sin))
        if not same or not off <= _OF_A_CIRCLE:
            raise BadInput(
                "expected tables of the cosine and the sine of angles, the same in both halves, got others, which would not rotate queries and keys; "
                "put their factor into the scale of the logits"
            )
        return math.sqrt(1 + off) * (1 + 2.0**-50)

    # ---- the program

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(N, T, H·d) → (N, H, T, d)."""
        return x.unflatten(-1, (-1, self.head_width)).transpose(-2, -3)

    def spread(self, x: torch.Tensor, dim: int = -3) -> torch.Tensor:
        """Key or value heads, Hk of them in dimension `dim`, repeated for each query head that uses them."""
        group = self.heads // self.key_heads
        return x if group == 1 else x.repeat_interleave(group, dim)

    def turned(self, x: torch.Tensor, position: torch.Tensor | None = None, back: bool = False) -> torch.Tensor:
        """Rx for queries or keys (…, T, d), or Rᵀx if `back`. position: of each token, as in `rotary`, by default 0 … T − 1."""
        if self.cos is not None and self.sin is not None:
            cos, sin = (table if position is None else table[position] for table in (self.cos.to(x.dtype), self.sin.to(x.dtype)))
            return x * cos - rotate_half(x * sin) if back else x * cos + rotate_half(x) * sin
        if not self.rope:
            return x
        if back:
            position = -(torch.arange(x.shape[-2], device=x.device) if position is None else position)
        return rotary(x, position=position)

    def logit_bias(self, length: int) -> torch.Tensor | None:
        """The mask of the fused kernel: the layer's own, biases by distance (H, T, T) with −inf where masked, or None with nothing but causal."""
        if self.distance_bias is None:
            return self.mask
        bias = self.added(length)
        assert bias is not None
        return bias.masked_fill(~self.seen(length), -torch.inf) if self.causal else bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 3:
            raise BadInput(f"expected tokens (N, T, D), got {tuple(x.shape)}: without a batch dimension samples would attend to each other; add it")
        length = x.shape[-2]
        self.check_length(length)
        parts = self.projection(x).split(self._rows(), dim=-1) if self.joined else (self.query(x), self.key(x), self.value(x))
        q, k, v = (self.split(part) for part in parts)
        q, k = self.turned(q), self.turned(k)
        k, v = self.spread(k), self.spread(v)
        if self.explicit is None:
            bias = self.logit_bias(length)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=self.causal and bias is None, scale=self.logit_scale)
        else:
            mixed = self._masked(self._logits(q, k)).softmax(-1) @ v
        out = mixed.transpose(-2, -3).flatten(-2)
        if self.output is not None:
            out = self.output(out)
        return out if self.output_scale == 1.0 else out * self.output_scale

    def _logits(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        if self.explicit == "query":
            return (q * self.logit_scale if self.divisor is None else q / self.divisor) @ k.mT
        return (q @ k.mT) * self.logit_scale if self.divisor is None else (q @ k.mT) / self.divisor

    def _masked(self, logits: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return logits
        if self.mask.dtype == torch.bool:
            return logits.masked_fill(~self.mask, -torch.inf)
        return logits.masked_fill(self.mask <= UNSEEN, -torch.inf) if self.mask_fill else logits + self.mask

    def _table(self, table: torch.Tensor) -> torch.Tensor:
        """A table of angles (T, d)."""
        found = table.squeeze(0) if table.dim() == 3 and len(table) == 1 else table
        if found.dim() != 2 or found.shape[-1] != self.head_width or not found.is_floating_point():
            got = f"{tuple(table.shape)} of {table.dtype}"
            raise BadInput(f"expected tables of angles (T, {self.head_width}) or (1, T, {self.head_width}), got {got}; reshape them")
        return found

    def _mask_by_head(self) -> torch.Tensor:
        """The mask (T, T), or (H, T, T) where heads differ."""
        assert self.mask is not None
        mask = self.mask[0] if self.mask.dim() == 4 else self.mask
        mask = mask[0] if mask.dim() == 3 and len(mask) == 1 else mask
        return mask.expand(*mask.shape[:-2], mask.shape[-1], -1)

    def _check_mask(self) -> None:
        mask = self.mask
        assert mask is not None
        sizes = tuple(mask.shape)
        fits = 2 <= len(sizes) <= 4 and sizes[-2] in (1, sizes[-1]) and sizes[-1] >= 1
        if not fits or (len(sizes) > 2 and sizes[-3] not in (1, self.heads)) or (len(sizes) == 4 and sizes[0] != 1):
            raise BadInput(f"expected a mask broadcastable to (heads, T, T), the same for all samples, got shape {sizes}; give one of that shape")
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise BadInput(f"expected a mask of bools or of numbers that are added to logits, got {mask.dtype}; convert it, e.g. with mask.bool()")
        if mask.dtype != torch.bool and not bool((mask < torch.inf).all()):
            raise BadInput("expected a mask of finite numbers and −inf, got NaN or infinity; a token that sees one key alone has −inf at the others")
        if self.mask_fill and mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= UNSEEN)).all()):
            raise BadInput("expected a mask of 0 and −inf with mask_fill, got other numbers, which filling would leave out; add it instead")
        self.seen(sizes[-1])

    def extra_repr(self) -> str:
        # Exact numbers: this text is hashed into the certificate's architecture.
        distances = 0 if self.distance_bias is None else self.distance_bias.shape[1]
        more: dict[str, object] = {
            "head_width": None if self.head_width * self.heads == self.width else self.head_width,
            "key_heads": None if self.key_heads == self.heads else self.key_heads,
            "biases": self.biases if any(self.biases) else None,
            "joined": self.joined or None,
            "logit_scale": self.stated_scale,
            "mask": None if self.mask is None else tuple(self.mask.shape),
            "angles": None if self.cos is None else len(self.cos),
            "explicit": self.explicit,
            "divisor": self.divisor,
            "mask_fill": self.mask_fill or None,
            "output": None if self.output is not None else False,
        }
        return (
            f"width={self.width}, heads={self.heads}, scale={self.scale}, causal={self.causal}, rope={self.rope}, "
            f"output_scale={self.output_scale}, distance_bias={distances}"
        ) + "".join(f", {name}={value}" for name, value in more.items() if value is not None)
