"""The keys and values of all running requests: one row each, every row as long as it is.

A decoding batch is rows 0..n-1 of the same tensors, without a copy; the last row takes the place of one that leaves.
A prompt is read in a row of its own (the last one) and then moved, so that half-read prompts never join a batch.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH_TOKENS = 256


class Window:
    """Where the coming forward pass writes and what it sees; shared by all layers."""

    def __init__(self) -> None:
        self.rows = slice(0, 0)
        self.row_index = self.position_index = torch.zeros(0)  # (rows, 1) and (rows, tokens)
        self.length = 0  # tokens visible to the longest row


class RowLayer(CacheLayerMixin):
    """Keys and values of one transformer layer: (rows, heads, tokens, head_dim)."""

    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self, window: Window, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        super().__init__()
        self.window = window
        self.keys = like.new_zeros(rows, heads, 0, head_dim)
        self.values = like.new_zeros(rows, heads, 0, head_dim)
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is lazy here: the rows exist from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: object, **_kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write (rows, heads, tokens, head_dim) at the window's positions; the rows' keys and values so far."""
        at = self.window
        self.keys[at.row_index, :, at.position_index] = key_states.transpose(1, 2)
        self.values[at.row_index, :, at.position_index] = value_states.transpose(1, 2)
        return self.keys[at.rows, :, : at.length], self.values[at.rows, :, : at.length]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:  # noqa: ARG002 - the library's signature
        """(keys, offset) of the attention mask; the mask itself is handed to the model ready-made."""
        return self.window.length, 0

    def get_seq_length(self) -> int:
        """Tokens visible to the longest row."""
        return self.window.length

    def get_max_length(self) -> int:
        """Unbounded: rows grow."""
        return -1

    def grow(self, tokens: int) -> None:
        """Make room for `tokens` tokens in every row. Zeros, not garbage: a masked NaN is still a NaN."""
        rows, heads, have, head_dim = self.keys.shape
        room = self.keys.new_zeros(rows, heads, tokens - have, head_dim)
        self.keys, self.values = torch.cat([self.keys, room], 2), torch.cat([self.values, room], 2)


class Rows:
    """The cache of the whole model, addressed by row."""

    def __init__(self, layers: int, rows: int, heads: int, head_dim: int, like: torch.Tensor) -> None:
        """`rows` decoding rows and one more for the prompt that is being read."""
        self.window = Window()
        self.layers = [RowLayer(self.window, rows + 1, heads, head_dim, like) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self.reading = rows
        self.capacity = 0
        self._device = like.device

    def point(self, rows: slice, positions: torch.Tensor, length: int) -> torch.Tensor:
        """Aim the next forward pass at `positions` (rows, tokens); the mask: (rows, 1, tokens, keys), True = seen.

        `length`: tokens of the longest row after it, one more than the last position. Taken from the caller, since
        reading it from `positions` would wait for a GPU at every step.
        """
        if length > self.capacity:
            self.capacity = -(-length // GROWTH_TOKENS) * GROWTH_TOKENS
            for layer in self.layers:
                layer.grow(self.capacity)
        window = self.window
        window.rows, window.position_index, window.length = rows, positions, length
        window.row_index = torch.arange(rows.start, rows.stop, device=self._device)[:, None]
        return torch.arange(length, device=self._device)[None, None, None, :] <= positions[:, None, :, None]

    def reset(self) -> None:
        """Forget every row."""
        self.capacity = 0
        for layer in self.layers:
            layer.keys, layer.values = layer.keys[:, :, :0], layer.values[:, :, :0]

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row's first `length` tokens to another row."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Forget a row: its text is nobody else's, and a NaN in it must not outlive its request."""
        for layer in self.layers:
            layer.keys[row, :, :length] = 0
            layer.values[row, :, :length] = 0
