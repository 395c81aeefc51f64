"""The Llama of the paper: RMSNorm, rotary positions, causal attention, and an MLP whose activation is what we compare.

Modules carry the names Hugging Face gives them (embed_tokens, self_attn.q_proj, mlp.act_fn, …), sizes those of
Llama (dim, n_layers, …). B is the batch, T the sequence length, C the model's width `dim`, D a head's width.

Weights are kept in float32; the model computes in `compute_dtype`. Each Linear casts its weight to the dtype of
its input, so the dtype of x is the precision: the residual stream is in the compute dtype (as in the paper's
bf16 runs), while norms, rotary angles and the loss are computed in float32.
"""

import hashlib
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from activations import get_activation
from plumbing.command import UserError
from plumbing.config import Keys, key
from xielu import upcast

# Targets of this value are ignored: they pad the last validation batch.
IGNORE = -1

# Without a GPU, the loss sees at most this many logits at a time (2 GB in bfloat16).
LOGITS_AT_ONCE = 2**30


@dataclass(frozen=True)
class ModelConfig(Keys):
    """The keys that make the model."""

    activation: str = key("xielu", "a name from activations.py, or derived/NAME.py")
    dim: int = key(384, "width of the residual stream", low=1)
    n_layers: int = key(6, "number of blocks", low=1, most=10_000)
    n_heads: int = key(6, "attention heads", low=1)
    n_kv_heads: int = key(6, "key and value heads; fewer than n_heads for grouped queries", low=1)
    ffn_dim: int = key(1536, "width of an ungated MLP; a gated activation gets 2/3 of it", low=1)
    vocab_size: int = key(257, "rows of the embedding; at least the tokenizer's", low=1)
    seq_len: int = key(256, "tokens per sequence", low=1, most=2**20)
    rope_theta: float = key(500000.0, "base of the rotary frequencies", low=1)
    norm_eps: float = key(1e-6, "epsilon of RMSNorm", low=0)
    qk_norm: bool = key(False, "RMSNorm on each head's queries and keys, before they are rotated")
    tie_embeddings: bool = key(True, "one matrix for embedding and output head")
    init_std: float = key(0.025, "standard deviation of the initial weights", low=0)

    def __post_init__(self):
        super().__post_init__()
        if self.dim % self.n_heads or self.head_dim % 2:
            raise UserError(f"dim={self.dim} over n_heads={self.n_heads} must give an even number for each head")
        if self.n_heads % self.n_kv_heads:
            raise UserError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.n_kv_heads}")
        if self.gated and self.ffn_dim % 3:
            needs = f"as the gated {self.activation!r} needs (it gets 2/3 of the width)"
            raise UserError(f"ffn_dim={self.ffn_dim} does not divide by 3, {needs}: take {self.ffn_dim // 3 * 3 + 3}")

    @property
    def head_dim(self):
        return self.dim // self.n_heads

    @property
    def gated(self):
        return get_activation(self.activation).gated

    @property
    def mlp_dim(self):
        """The width of the MLP that is built: ffn_dim, or 2/3 of it if gated, so that its three matrices have as many
        parameters and cost as many FLOPs as the two of the ungated one."""
        return self.ffn_dim * 2 // 3 if self.gated else self.ffn_dim


class Linear(nn.Module):
    """A linear layer without bias whose float32 weight is cast to the dtype of its input."""

    def __init__(self, in_features, out_features):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))  # filled by Llama.init_weights

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.RMSNorm):
    """x / rms(x) · weight, with the root mean square over the last dimension, computed in float32."""

    def forward(self, x):
        return super().forward(upcast(x)).to(x.dtype)


def rope_table(seq_len, head_dim, theta):
    """cos and sin of the rotary angles, each (T, D/2) in float32: in bf16 angles would be off by up to 16 rad (D = 96,
    T = 4096)."""
    frequencies = theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32), frequencies)
    return angles.cos(), angles.sin()


def apply_rope(x, cos, sin):
    """Rotate the pairs (x_i, x_{i + D/2}) of x (…, D) by angles whose cos and sin (…, D/2) broadcast to them."""
    first, second = upcast(x).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal self-attention. With n_kv_heads < n_heads, several queries share each key and value (GQA)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.heads = (config.n_heads, config.n_kv_heads, config.n_kv_heads)  # of q, k and v
        self.q_proj = Linear(config.dim, config.n_heads * self.head_dim)
        self.k_proj = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.v_proj = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.o_proj = Linear(config.n_heads * self.head_dim, config.dim)
        norm = RMSNorm if config.qk_norm else nn.Identity
        self.q_norm, self.k_norm = (norm(self.head_dim, config.norm_eps) for _ in range(2))

    def forward(self, x, cos, sin):
        """(B, T, C) → (B, T, C). q and k are rotated before they are transposed: in memory's own order, which saves a
        GPU three copies per layer."""
        # One matmul for all three: alone, each is too small for a large GPU. v is a view of `heads`, so the unrotated q
        # and k stay in memory until backward: 2.8 GiB more for the 1.1B run (copying v would take 2 ms instead).
        weight = torch.cat([proj.weight for proj in (self.q_proj, self.k_proj, self.v_proj)])
        heads = F.linear(x, weight.to(x.dtype)).unflatten(-1, (-1, self.head_dim))
        q, k, v = heads.split(self.heads, dim=-2)
        cos, sin = cos[:, None], sin[:, None]  # the same angles for every head
        q, k = apply_rope(self.q_norm(q), cos, sin), apply_rope(self.k_norm(k), cos, sin)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))  # (B, heads, T, D); k and v with their fewer heads
        # written out in bf16 it would be 8 % faster on a CPU, but torch 2.13 compiles it to a NaN in the gradient of k
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(act(up(x))), or down(act(gate(x), up(x))) for a gated activation."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.up_proj = Linear(config.dim, config.mlp_dim)
        self.gate_proj = Linear(config.dim, config.mlp_dim) if config.gated else None
        self.down_proj = Linear(config.mlp_dim, config.dim)
        self.act_fn = get_activation(config.activation).build(config.mlp_dim)

    def forward(self, x):
        if self.gate_proj is None:
            return self.down_proj(self.act_fn(self.up_proj(x)))
        return self.down_proj(self.act_fn(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x)), on x (B, T, C)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.dim, config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """tokens (B, T) → logits (B, T, vocab_size), or, given targets (B, T), their cross-entropy: "mean" (nats per token)
    or "sum"."""

    def __init__(self, config: ModelConfig, compute_dtype=torch.float32, seed=0):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        self.chunk_loss = chunk_loss  # compile_parts replaces it by its compiled form
        if seed is not None:  # None where a checkpoint fills the weights
            torch.manual_seed(seed)  # an activation's module may draw its own
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.lm_head = Linear(config.dim, config.vocab_size)
        if config.tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        cos, sin = rope_table(config.seq_len, config.head_dim, config.rope_theta)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        if seed is not None:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """Fill every weight, as the paper's configuration does:

            embedding, untied head, q, k, v, up, gate      N(0, init_std)
            o_proj, down_proj (they add to the residual)   N(0, init_std / √(2·n_layers))
            norm gains                                     1
            parameters of the activation                   as its module made them

        Each weight is drawn on the CPU from a random stream of its own, set by (seed, name): models that differ only
        in their activation share weights of equal name and shape.
        """
        for name, weight in self.named_parameters():
            if weight.is_meta or ".act_fn." in name or "norm" in name:
                continue
            std = self.config.init_std
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                std /= math.sqrt(2 * self.config.n_layers)
            stream = hashlib.sha256(f"{seed} {name}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(stream[:8], "little"))
            weight.copy_(torch.randn(weight.shape, generator=generator, device="cpu") * std)

    def hidden(self, tokens):
        """The final hidden states (B, T, C), from which the head makes logits."""
        T = tokens.shape[1]
        x = self.embed_tokens(tokens).to(self.compute_dtype)
        for layer in self.layers:
            x = layer(x, self.cos[:T], self.sin[:T])
        return self.norm(x)

    def forward(self, tokens, targets=None, reduction="mean"):
        x = self.hidden(tokens)
        if targets is None:
            return self.lm_head(x)
        # The loss. Targets equal to IGNORE are left out, and no more than `rows` rows of logits are held at a time
        x, targets, weight, loss = x.flatten(0, 1), targets.flatten(), self.lm_head.weight, self.chunk_loss
        memory = torch.cuda.get_device_properties(x.device).total_memory if x.is_cuda else None
        rows = chunk_rows(len(x), self.config.vocab_size, memory)
        if len(x) > rows:  # the backward pass computes a chunk's logits again, rather than keep those of all chunks
            loss = partial(checkpoint, loss, use_reentrant=False, preserve_rng_state=False)
        total = sum(loss(h, weight, t) for h, t in zip(x.split(rows), targets.split(rows)))
        return total / (targets != IGNORE).sum() if reduction == "mean" else total

    def compile_parts(self):
        """Compile each layer, the last norm and the loss of a chunk, in place. The layers share one compilation (24
        take as long as one), state-dict names stay as they are, DDP can send one layer's gradients while the next layer
        computes, and no more than one chunk of logits is ever held."""
        # On a GPU, Inductor would otherwise write part of xIELU's backward pass to memory and read it back; at 200
        # operations it is one kernel (docs/kernels.md).
        options = {"realize_opcount_threshold": 200} if self.cos.is_cuda else None
        for layer in self.layers:
            layer.compile(fullgraph=True, options=options)  # a graph break would be slow, and say nothing
        self.norm.compile()
        self.chunk_loss = torch.compile(chunk_loss)

    def activation_parameters(self):
        """The activations' parameters, of any shape; they get no weight decay."""
        return [weight for layer in self.layers for weight in layer.mlp.act_fn.parameters()]

    def matrices(self):
        """The weights of the layers' Linear modules, which Muon can take."""
        modules = self.layers.named_modules()
        return [m.weight for name, m in modules if isinstance(m, Linear) and ".act_fn." not in name]

    def effective_alphas(self):
        """{name: [value in each layer]} of the activation's effective scalars; {} if it has none."""
        layers = [layer.mlp.act_fn.effective() for layer in self.layers if hasattr(layer.mlp.act_fn, "effective")]
        return {name: [layer[name] for layer in layers] for name in layers[0]} if layers else {}

    def num_parameters(self):
        """Trained parameters, tied ones counted once."""
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self):
        """FLOPs to train on one token: 6 for each weight that multiplies, plus attention's 12·layers·width·T."""
        multiplying = sum(module.weight.numel() for module in self.modules() if isinstance(module, Linear))
        return 6 * multiplying + 12 * self.config.n_layers * self.config.dim * self.config.seq_len


def chunk_rows(rows, vocab_size, gpu_memory=None):
    """How many of the rows of logits the loss computes at once: as many as LOGITS_AT_ONCE allows or, given the bytes of
    a GPU's memory, an eighth of it in bfloat16. They divide `rows`: one compilation serves equal chunks."""
    limit = LOGITS_AT_ONCE if gpu_memory is None else gpu_memory // 16
    most = max(1, min(rows, limit // vocab_size))
    return next(size for size in range(most, 0, -1) if rows % size == 0)


def chunk_loss(x, weight, targets):
    """Summed cross-entropy in float32 of hidden states x (N, C) with targets (N,), by the head's weight (V, C)."""
    # not torch's linear_cross_entropy, which rounds the loss to bf16, breaks the graph, and is not in torch 2.11
    logits = F.linear(x, weight.to(x.dtype))
    return F.cross_entropy(upcast(logits), targets, ignore_index=IGNORE, reduction="sum")
