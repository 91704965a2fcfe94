"""Mods in the oracle: scores that the user's own functions change, in fp64, and how sensitive they are.

The tolerance rule asks how far a rounded dot product may move a logit, S = max_j reach_j. Behind a mod f the same
rounding moves it by |f'| times that, and f's own arithmetic by a share of |f|; behind an activation g what counts is
the relative change of the weight, |(ln g f)'|. The derivatives come from autograd, so any mod gets its tolerance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from openmla.mods import Attached, Site


@dataclass(frozen=True)
class Scores:
    """What happens to scores [h_kv, rows, n] between the dot product and the weights; nothing without `attached`."""

    attached: Attached | None = None
    site: Site | None = None

    @property
    def has_activation(self) -> bool:
        """Weights are no exponentials, and are not divided by their sum."""
        return self.attached is not None and self.attached.form.activation is not None

    def _site(self, first: int, count: int) -> Site:
        assert self.site is not None
        return self.site._replace(kv_idx=self.site.kv_idx[first : first + count])

    def changed(self, raw: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Every score_mod, for keys from `first` on."""
        return raw if self.attached is None else self.attached.scores(raw, self._site(first, raw.shape[-1]))

    def visible(self, seen: torch.Tensor) -> torch.Tensor:
        """What is left of `seen` behind every mask_mod."""
        shown = None if self.attached is None else self.attached.visible(self._site(0, seen.shape[-1]))
        return seen if shown is None else seen & shown

    def weights(self, logits: torch.Tensor, first: int = 0) -> torch.Tensor:
        """The activation, for keys from `first` on."""
        assert self.attached is not None
        return self.attached.weights(logits, self._site(first, logits.shape[-1]))

    def reach(self, raw: torch.Tensor, reach: torch.Tensor) -> torch.Tensor:
        """How far the error of raw scores, in units of `reach`, moves what follows them; shape of both."""
        if self.attached is None or not self.attached.form.functions:
            return reach
        with torch.enable_grad():
            source = raw.detach().nan_to_num(0.0, 0.0, 0.0).requires_grad_()
            result = self.changed(source)
            if self.has_activation:
                weights = self.weights(result).abs()
                result = torch.where(weights > 0, weights, 1.0).log()
            slope = torch.zeros_like(source)
            if result.requires_grad:
                (slope,) = torch.autograd.grad(result.sum(), source)
        own = torch.ones_like(raw) if self.has_activation else result.detach().abs()
        return slope.abs().nan_to_num(0.0, 0.0, 0.0) * reach + own.nan_to_num(0.0, 0.0, 0.0)


PLAIN = Scores()


def scores_of(
    attached: Attached, q: torch.Tensor, request: int, s_k: int, h_kv: int, d_v: int
) -> tuple[torch.Tensor, Scores]:
    """(q [s_q, h_q, d_qk] with RoPE, scores) of one request's queries over its s_k keys."""
    s_q, h_q = q.shape[:2]
    group = h_q // h_kv
    position = s_k - s_q + torch.arange(s_q, dtype=torch.int32, device=q.device)
    heads = torch.arange(h_q, dtype=torch.int32, device=q.device).view(h_kv, 1, group).expand(h_kv, s_q, group)
    site = Site(
        torch.tensor(request, dtype=torch.int32, device=q.device),
        heads.reshape(h_kv, s_q * group, 1),
        position.repeat_interleave(group)[None, :, None],
        torch.arange(s_k, dtype=torch.int32, device=q.device),
    )
    if attached.rope is not None:
        q = attached.rope.rotated(q, d_v, position)
    return q, Scores(attached, site)
