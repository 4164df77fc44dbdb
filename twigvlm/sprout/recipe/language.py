"""How the decoder begins, how it grows, and its loss: that on the next token of whole conversations.

Visual tokens stand at the positions that the patches of a picture have, be they symbols (sums of the
embeddings of the words for what a patch shows) or a picture's own. Depth grows by doubling: each
layer becomes two that add half of what it added.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch.nn import functional as F
from transformers import LlavaConfig, LlavaForConditionalGeneration

from ...model.trunk import rotate_half
from .base import build
from .symbols import CELL_BITS, spell
from .tower import SIDE

MATCHING = 2.0  # times the plain start's queries and keys: like attends to like
BACK = {2: 1, 3: 2}  # heads of the first layer that begin by looking so many tokens back
SHARPNESS = 6.0  # how far the score of that token stands above its neighbours', in nats
SLOWEST = 0.02  # radians a token: slower pairs of a head do not tell neighbours apart
COPYING = 0.5  # of what a head fetches is added to the stream at the start
LOOKING = 1  # the layer of the first four that is helped to look; it becomes layers 8 to 15 of 32
LOOKING_HEADS = 2
HIDDEN = -1e4
EOS = 2
WIPED = 0.75  # of the depth: where pruning drops all visual tokens (F = 24 of 32)
HEAD_GAIN = 0.08  # of the final norm at the start, so that the first guesses are soft


def start(config: LlavaConfig, seed: int = 0) -> LlavaForConditionalGeneration:
    """Fresh weights whose head is the embedding table: what is looked up is said by copying it."""
    model = build(config, seed)
    tie(model)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model.model.language_model.norm.weight.fill_(HEAD_GAIN)
        for layer in model.model.language_model.layers:
            part = layer.self_attn
            part.q_proj.weight.mul_(MATCHING)
            part.k_proj.weight.mul_(MATCHING)
            # What a head fetches it hands on as it was (an orthogonal map and back), so that it can be said.
            torch.nn.init.orthogonal_(part.v_proj.weight)
            part.o_proj.weight.copy_(part.v_proj.weight.T * COPYING)
        _look_back(model.model.language_model)
    return model


def _look_back(decoder) -> None:
    """Some heads of the first layer begin by looking at the token before, or at the one before that.

    To see what stands before a word is the first thing that a language model learns, and takes this one thousands
    of steps: without it an option cannot be told from its letter. Every embedding gets the same share of one direction (the tied
    head sees no difference), from which these heads' queries and keys are made. A score is 0 at the token
    wanted and less the more its place differs: what the quick pairs give at best, a pair that hardly turns takes away.
    """
    part, table = decoder.layers[0].self_attn, decoder.embed_tokens.weight
    table[:, 0] = table.std()
    frequencies = decoder.rotary_emb.inv_freq
    quick = (frequencies > SLOWEST).float()
    size = (SHARPNESS / part.scaling / (quick * (1 - frequencies.cos())).sum()).sqrt()
    still = torch.zeros_like(quick)
    still[-1] = quick.sum().sqrt()
    for head, back in BACK.items():
        if (head + 1) * part.head_dim <= part.q_proj.out_features:
            rows = slice(head * part.head_dim, (head + 1) * part.head_dim)
            part.q_proj.weight[rows], part.k_proj.weight[rows] = 0.0, 0.0
            turn = -back * frequencies
            part.q_proj.weight[rows, 0] = size * torch.cat([turn.cos() * quick - still, turn.sin() * quick])
            part.k_proj.weight[rows, 0] = size * torch.cat([quick + still, 0 * quick])


def tie(model: LlavaForConditionalGeneration) -> None:
    """One matrix for embedding and head while training; the published files hold it twice."""
    model.lm_head.weight = model.model.language_model.embed_tokens.weight


def double(shallow: LlavaForConditionalGeneration, config: LlavaConfig) -> LlavaForConditionalGeneration:
    """Twice the layers: each stands twice in a row with half of its residual outputs, nearly the same function."""
    deep = build(config)
    prefix = "model.language_model.layers."
    kept = {k: v for k, v in shallow.state_dict().items() if not k.startswith(prefix)}
    deep.load_state_dict(kept, strict=False)
    tie(deep)
    old, new = shallow.model.language_model.layers, deep.model.language_model.layers
    with torch.no_grad():
        for i, layer in enumerate(new):
            layer.load_state_dict(copy.deepcopy(old[i * len(old) // len(new)].state_dict()))
            layer.self_attn.o_proj.weight.mul_(len(old) / len(new))
            layer.mlp.down_proj.weight.mul_(len(old) / len(new))
    return deep


def visual_tokens(model: LlavaForConditionalGeneration, values: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Projected visual tokens [B, kept, D] of pixels [B, 3, h, w]; no gradient enters the tower."""
    with torch.no_grad():
        tower = model.model.vision_tower
        hidden = tower.pre_layrnorm(tower.embeddings(values))
        for layer in tower.encoder.layers[: len(tower.encoder.layers) + 1 + model.config.vision_feature_layer]:
            hidden = layer(hidden, None)
    return model.model.multi_modal_projector(hidden[:, 1:][:, keep])


class Talk:
    """The next-token loss on rows of talk.py."""

    def __init__(self, model: LlavaForConditionalGeneration):
        self.model, self.decoder = model, model.model.language_model
        self.decoder.config._attn_implementation = "sdpa"  # without a mask: causal
        self.layers = list(self.decoder.layers)

    @property
    def device(self) -> torch.device:
        return self.decoder.embed_tokens.weight.device

    def embed(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states [B, V' + S, D] with the visual tokens in their place, and positions of the whole picture's."""
        table = self.decoder.embed_tokens.weight
        words, visual = F.embedding(batch["ids"], table), self.visual(batch)
        rows, count, heads = len(words), visual.shape[1], batch["heads"][:, None]
        places = torch.arange(count + words.shape[1], device=heads.device).expand(rows, -1)
        after = places >= heads + count
        seen = (places >= heads) & ~after
        source = torch.where(after, places - count, torch.where(seen, words.shape[1] + places - heads, places))
        both = torch.cat([words, visual], 1)
        hidden = both.gather(1, source[..., None].expand(-1, -1, both.shape[-1]))
        kept = batch["keep"].expand(rows, -1).gather(1, (places - heads).clamp(0, count - 1))
        positions = torch.where(after, places - count + SIDE * SIDE, torch.where(seen, heads + kept, places))
        return hidden, positions

    def visual(self, batch: dict) -> torch.Tensor:
        """Visual tokens [B, V', D]: of pictures where the batch has pixels, else of symbols."""
        if "pixels" in batch:
            seen = visual_tokens(self.model, batch["pixels"], batch["keep"])
        else:
            seen = spell(batch["symbols"], self.decoder.embed_tokens.weight)
        return seen[batch["of"]] if "of" in batch else seen

    def run(self, hidden: torch.Tensor, positions: torch.Tensor, layers: Sequence) -> torch.Tensor:
        """Through these layers, causally."""
        rotary = self.decoder.rotary_emb(hidden, positions)
        for layer in layers:
            hidden = layer(hidden, attention_mask=None, position_embeddings=rotary)
        return hidden

    def guesses(self, hidden: torch.Tensor, batch: dict) -> torch.Tensor:
        """What left the last layer [B, V' + S, D] → fp32 logits [B, S, vocabulary] of what follows each word.

        The last word before the picture guesses behind the picture, as the next word stands there.
        """
        words = batch["ids"].shape[1]
        places = torch.arange(words, device=hidden.device).expand(len(hidden), -1)
        places = torch.where(places < batch["heads"][:, None] - 1, places, places + hidden.shape[1] - words)
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.model.lm_head(self.decoder.norm(hidden)).float()

    def logits(self, batch: dict, layers: Sequence | None = None) -> torch.Tensor:
        """fp32 [B, S, vocabulary], through `layers` (default: all)."""
        hidden, positions = self.embed(batch)
        return self.guesses(self.run(hidden, positions, self.layers if layers is None else layers), batch)

    def looking(self, batch: dict, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """How far tokens that name something are from looking at the symbols of it: mean -log share.

        Measured on the first heads of layer LOOKING, which `hidden` [B, V' + S, D] enters.
        """
        layer, count = self.layers[LOOKING], hidden.shape[1] - batch["ids"].shape[1]
        rows, places = batch["looks"].nonzero(as_tuple=True)
        bits = torch.tensor(CELL_BITS, device=hidden.device)[batch["keep"]]
        filled = (batch["symbols"] == batch["nothing"]).any(-1).logical_not()[batch["of"]]
        wanted = (batch["looks"][rows, places, None] & bits > 0) & filled[rows]
        found = wanted.any(-1)
        rows, places, wanted = rows[found], places[found], wanted[found]
        asked = torch.where(places < batch["heads"][rows], places, places + count)
        seen = batch["heads"][:, None] + torch.arange(count, device=hidden.device)
        part = layer.self_attn
        heads = min(LOOKING_HEADS, part.q_proj.out_features // part.head_dim)
        width = heads * part.head_dim
        normed = layer.input_layernorm(hidden)
        cos, sin = self.decoder.rotary_emb(hidden, positions)
        query = F.linear(normed[rows, asked], part.q_proj.weight[:width]).unflatten(-1, (heads, -1))
        each = torch.arange(len(hidden), device=hidden.device)[:, None]
        key = F.linear(normed[each, seen], part.k_proj.weight[:width]).unflatten(-1, (heads, -1))
        query = query * cos[rows, asked][:, None] + rotate_half(query) * sin[rows, asked][:, None]
        key = key * cos[each, seen][:, :, None] + rotate_half(key) * sin[each, seen][:, :, None]
        spent = (torch.einsum("nhd,nvhd->nhv", query, key[rows]) * part.scaling).log_softmax(-1)
        return -spent.masked_fill(~wanted[:, None], HIDDEN).logsumexp(-1).mean()

    def loss(self, batch: dict) -> tuple[torch.Tensor, dict[str, float]]:
        """Weighted cross-entropy of the next tokens, and the shares guessed right: short answers, descriptions, the rest."""
        hidden, positions = self.embed(batch)
        entering = self.run(hidden, positions, self.layers[:LOOKING])
        logits = self.guesses(self.upwards(entering, positions, batch), batch)[:, :-1]
        targets, weights, short = batch["ids"][:, 1:], batch["weights"][:, 1:], batch["short"][:, 1:]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        # Sums over masks, which no device waits for; a row's padding has no weight.
        right, long = logits.argmax(-1) == targets, ~short & (weights >= 0.5)
        which = {"short": short & (targets != EOS), "long": long, "asked": ~short & ~long & (weights > 0)}
        figures = {name: (right & some).sum() / some.sum().clamp(min=1) for name, some in which.items()}
        figures["looking"] = torch.zeros(())
        if batch["help"]:
            figures["looking"] = self.looking(batch, entering, positions)
            loss = loss + batch["help"] * figures["looking"]
        return loss, {name: figure.detach() for name, figure in figures.items()}

    def upwards(self, hidden: torch.Tensor, positions: torch.Tensor, batch: dict) -> torch.Tensor:
        """From layer LOOKING through the last: [B, V' + S, D]; where the batch is "wiped" only [B, S, D], of the words.

        Then the layers from three quarters of the depth on see no visual tokens, as under pruning.
        """
        if not batch.get("wiped"):
            return self.run(hidden, positions, self.layers[LOOKING:])
        wipe = round(WIPED * len(self.layers))
        hidden = self.run(hidden, positions, self.layers[LOOKING:wipe])
        words = batch["ids"].shape[1]
        places = torch.arange(words, device=hidden.device).expand(len(hidden), -1)
        places = torch.where(places < batch["heads"][:, None], places, places + hidden.shape[1] - words)
        hidden = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return self.run(hidden, positions.gather(1, places), self.layers[wipe:])
