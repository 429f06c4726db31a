"""The shapes of a decoder's parameters, as a plan reckons with them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """One linear of a block."""

    name: str
    """Last part of its name, which adapters are aimed at."""
    out_features: int
    in_features: int
    bias: bool = False
    copies: int = 1
    """Experts that have one like it."""

    @property
    def weights(self) -> int:
        """Weights of all copies, biases left out."""
        return self.out_features * self.in_features * self.copies


@dataclass(frozen=True)
class ModelShape:
    """A decoder: so many equal blocks between an embedding and a head."""

    model_type: str
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    query_width: int
    """Of all heads together; keys and values have `key_width` each."""
    key_width: int
    intermediate: int
    """Width inside a feed-forward, or inside one expert."""
    linears: tuple[Linear, ...]
    """Of one block."""
    vector_parameters: int
    """Of one block besides its linears: norms, and what attention has of its own."""
    outer_parameters: int
    """Besides the blocks, the embedding and the head: the last norm, a table of positions."""
    tied: bool
    """Whether the head is the embedding."""
    experts: int = 0
    experts_per_token: int = 0
    norms: int = 2
    """Over the whole width, in one block."""
    head_norms: bool = False
    """Whether queries and keys have norms of their own."""
    gated: bool = True
    """Whether the feed-forward multiplies two of its linears."""
    joined_qkv: bool = False
    """Whether one linear makes queries, keys and values, and keeps them alive together."""
    rotary: bool = True
    attention_softcap: bool = False
    """Whether scores of attention are capped: they stand in memory where rows are no one call."""
    attention_scores: bool = False
    """Whether they stand in memory everywhere."""
    head_softcap: bool = False
    float32_norms: bool = True
    """Whether norms compute on a float32 copy of their input, which stays for backward."""

    @property
    def block_weights(self) -> int:
        """Weights of the linears of one block, biases left out."""
        return sum(linear.weights for linear in self.linears)

    @property
    def block_biases(self) -> int:
        """Biases of the linears of one block."""
        return sum(linear.out_features * linear.copies for linear in self.linears if linear.bias)

    @property
    def vocabulary_matrices(self) -> int:
        """Embedding and head: 2 matrices, 1 where they are tied."""
        return 1 if self.tied else 2

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        block = self.block_weights + self.block_biases + self.vector_parameters
        vocabulary = self.vocabulary_matrices * self.vocabulary * self.hidden
        return self.layers * block + vocabulary + self.outer_parameters

    @property
    def active_block_weights(self) -> int:
        """Weights of the linears of one block that one token passes."""
        return sum(
            linear.weights // linear.copies * (self.experts_per_token if linear.copies > 1 else 1)
            for linear in self.linears
        )

    @property
    def largest_linear(self) -> Linear:
        """The linear with the most weights in one piece."""
        return max(self.linears, key=lambda linear: linear.out_features * linear.in_features)
