"""The fused layers of a language model, kept for as long as the model is the same: to find them takes as long as two steps of a small
model on a CPU."""

from typing import Any

from torch import nn

from granite_speech.modules.fused_layers import FusedLayers
from granite_speech.modules.fused_products import can_be_read
from granite_speech.modules.hooks import have_hooks
from granite_speech.modules.snapshot import Snapshot

__all__ = ["LayersInUse"]


class LayersInUse:
    """The layers of one model.

    Args:
        model: its `language_model` is followed.

    Attributes:
        has_hooks: whether a module of the decoder has a hook, which sees the padded layout.
        layers: of the decoder; None if its modules must run one by one.
        with_head: the same, if the embedding and the head are usual too; else None.
    """

    def __init__(self, model: Any):
        self.model = model
        self.has_hooks = False
        self.layers: FusedLayers | None = None
        self.with_head: FusedLayers | None = None
        self._snapshot: Snapshot | None = None

    def follow(self) -> Snapshot:
        """Find them again if the model has changed, as other requests and callbacks of this one may do. Then it is another snapshot."""
        if self._snapshot is None or not self._snapshot.is_current():
            self._snapshot = Snapshot(self.model.language_model)
            self.has_hooks = have_hooks(self.model.decoder)
            self._find()
        return self._snapshot

    def forget_copies(self) -> None:
        """Copy small weights again when they are needed: one may have been written to in a way that nothing records."""
        if self.layers is not None:
            self.layers = self.layers.without_copies()
            self.with_head = self.layers if self.with_head is not None else None

    def _find(self) -> None:
        decoder, language_model = self.model.decoder, self.model.language_model
        self.layers = self.with_head = None
        if self.has_hooks:
            return
        embedding, head = decoder.embed_tokens, language_model.lm_head
        if type(embedding) is nn.Embedding and embedding.max_norm is None and not have_hooks(head):
            self.with_head = FusedLayers.of(decoder, head, language_model.config.logits_scaling)
        if self.with_head is not None and not can_be_read(embedding.weight, decoder.norm.weight.dtype):
            self.with_head = None
        self.layers = FusedLayers.of(decoder) if self.with_head is None else self.with_head
