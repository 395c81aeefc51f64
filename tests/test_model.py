"""model.py: exact sizes, the paper's initialisation, and the arithmetic against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from model import IGNORE, Llama, ModelConfig, apply_rope, rope_table

TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=31, seq_len=16)
PAPER = {
    "1.1B": dict(dim=1536, n_layers=24, n_heads=16, n_kv_heads=16, ffn_dim=9216, vocab_size=147456, seq_len=4096),
    "3B": dict(
        dim=2048, n_layers=36, n_heads=16, n_kv_heads=16, ffn_dim=12288, vocab_size=147456, seq_len=4096,
        tie_embeddings=False,
    ),
}  # fmt: skip
PARAMETERS = {"1.1B": 1_132_537_344, "3B": 3_020_048_384}


def tokens(batch=2, length=16, vocab=31, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", PAPER)
@pytest.mark.parametrize("activation", ["swiglu", "relu2", "xielu"])
def test_parameter_counts_of_the_paper(size, activation):
    with torch.device("meta"):
        model = Llama(ModelConfig(**PAPER[size], activation=activation))
    extra = 2 * len(model.layers) if activation == "xielu" else 0
    assert model.num_parameters() == PARAMETERS[size] + extra


def test_flops_per_token():
    with torch.device("meta"):
        flops = {
            name: Llama(ModelConfig(**PAPER["1.1B"], activation=name)).flops_per_token() for name in ("xielu", "swiglu")
        }
        untied = Llama(ModelConfig(**TINY, tie_embeddings=False))
        tied = Llama(ModelConfig(**TINY))
    # 24 layers of q, k, v, o (4·1536²) and the MLP (2·1536·9216), the head, and attention
    matrices = 24 * (4 * 1536**2 + 2 * 1536 * 9216) + 147456 * 1536
    assert flops["xielu"] == flops["swiglu"] == 6 * matrices + 12 * 24 * 1536 * 4096
    assert flops["xielu"] == pytest.approx(8.6e9, rel=0.01)
    assert untied.flops_per_token() == tied.flops_per_token()


def test_gated_width():
    assert ModelConfig(ffn_dim=1536, activation="swiglu").mlp_dim == 1024
    assert ModelConfig(ffn_dim=1537, activation="xielu").mlp_dim == 1537
    with pytest.raises(ValueError, match="ffn_dim=1537 .* nearest that does is 1536 or 1539"):
        ModelConfig(ffn_dim=1537, activation="swiglu")
    with pytest.raises(ValueError, match="unknown activation"):
        ModelConfig(activation="swigul")


@pytest.mark.parametrize("bad", [dict(n_heads=5), dict(dim=30, n_heads=6), dict(n_kv_heads=3), dict(n_layers=0)])
def test_impossible_sizes(bad):
    with pytest.raises(ValueError):
        ModelConfig(**TINY | bad)


def test_initialisation():
    config = ModelConfig(**TINY | dict(dim=256, ffn_dim=768, vocab_size=500), tie_embeddings=False)
    model = Llama(config, seed=1)
    for name, weight in model.named_parameters():
        if "norm" in name:
            assert (weight == 1).all()
        elif "act_fn" not in name:
            residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            expected = 0.025 / math.sqrt(2 * config.n_layers) if residual else 0.025
            assert weight.std().item() == pytest.approx(expected, rel=0.02), name
            assert abs(weight.mean().item()) < 1e-3


def test_activations_share_the_weights_both_have():
    weights = {name: Llama(ModelConfig(**TINY, activation=name), seed=3).state_dict() for name in ("xielu", "swiglu")}
    shared = [key for key in weights["swiglu"] if ".mlp." not in key]
    assert all(torch.equal(weights["xielu"][key], weights["swiglu"][key]) for key in shared)
    relu2 = Llama(ModelConfig(**TINY, activation="relu2"), seed=3).state_dict()
    assert all(torch.equal(weights["xielu"][key], relu2[key]) for key in relu2)
    other = Llama(ModelConfig(**TINY), seed=4).state_dict()
    assert not torch.equal(other["embed_tokens.weight"], weights["xielu"]["embed_tokens.weight"])


def test_rope_turns_pairs_and_keeps_relative_positions():
    cos, sin = rope_table(64, 8, 10000.0)
    x = torch.randn(1, 1, 64, 8)
    turned = apply_rope(x, cos, sin)
    assert torch.equal(turned[:, :, 0], x[:, :, 0])
    as_complex = torch.view_as_complex(torch.stack(x.chunk(2, dim=-1), dim=-1))
    angles = torch.arange(64).double()[:, None] * 10000.0 ** -(torch.arange(4).double() / 4)
    expected = as_complex.to(torch.complex128) * torch.polar(torch.ones_like(angles), angles)
    torch.testing.assert_close(turned.double(), torch.cat((expected.real, expected.imag), -1), rtol=0, atol=1e-4)
    constant = apply_rope(torch.ones(1, 1, 64, 8), cos, sin)[0, 0]
    torch.testing.assert_close(constant[3] @ constant[10], constant[40] @ constant[47])


def test_rope_is_float32_in_a_bf16_model():
    model = Llama(ModelConfig(**TINY | dict(seq_len=4096)), torch.bfloat16)
    assert model.cos.dtype == model.sin.dtype == torch.float32
    angles = 4095 * 500000.0 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(model.cos[4095].double(), angles.cos(), rtol=0, atol=1e-3)


def test_forward_against_plain_formulas():
    config = ModelConfig(**TINY, activation="relu2")
    model = Llama(config, seed=5)
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    ids = tokens()

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    x = weights["embed_tokens.weight"][ids]
    for number in range(config.n_layers):
        w = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{number}.")}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (4, 8)).transpose(1, 2) for name in "qkv")
        cos, sin = model.cos.double(), model.sin.double()
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        x = x + (h @ w["mlp.up_proj.weight"].T).clamp(min=0).square() @ w["mlp.down_proj.weight"].T
    logits = norm(x, weights["norm.weight"]) @ weights["embed_tokens.weight"].T
    torch.testing.assert_close(model(ids).double(), logits, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert model(ids, ids).item() == pytest.approx(loss.item(), rel=1e-5)


def test_causal():
    model = Llama(ModelConfig(**TINY), seed=0)
    ids = tokens()
    changed = ids.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 31
    assert torch.equal(model(ids)[:, :9], model(changed)[:, :9])


def test_grouped_queries_equal_repeated_keys_and_values():
    grouped = Llama(ModelConfig(**TINY | dict(n_kv_heads=2)), seed=0)
    full = Llama(ModelConfig(**TINY), seed=0)
    weights = grouped.state_dict()
    for name in list(weights):
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            weights[name] = weights[name].unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)
    full.load_state_dict(weights)
    torch.testing.assert_close(grouped(tokens()), full(tokens()))


def test_bf16_is_close_and_its_weights_stay_float32():
    exact, rounded = Llama(ModelConfig(**TINY), seed=0), Llama(ModelConfig(**TINY), torch.bfloat16, seed=0)
    assert rounded(tokens()).dtype == torch.bfloat16
    loss = rounded(tokens(), tokens(seed=1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(tokens(), tokens(seed=1)).item(), rel=1e-2)
    loss.backward()
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in rounded.parameters())


@pytest.mark.parametrize("compiled", [False, True])
def test_loss_in_chunks_ignores_padding(monkeypatch, compiled):
    model = Llama(ModelConfig(**TINY), seed=0)
    if compiled:
        model.compile_parts()
    targets = tokens(seed=1)
    targets[1, 5:] = IGNORE
    results = []
    for limit in (2**28, 31 * 5):
        monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", limit)
        model.zero_grad()
        mean = model(tokens(), targets)
        mean.backward()
        total = model(tokens(), targets, reduction="sum")
        assert total.item() == pytest.approx(mean.item() * 21, rel=1e-5)
        results.append([mean.detach(), *(weight.grad.clone() for weight in model.parameters())])
    for whole, chunked in zip(*results):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_in_chunks_holds_a_chunk_of_logits(monkeypatch, dtype):
    config = ModelConfig(**TINY | dict(vocab_size=4096, seq_len=64))
    model = Llama(config, dtype)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 4096 * 8)
    kept = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x)
    with hooks:
        loss = model(tokens(4, 64), tokens(4, 64, seed=1))
    assert max(kept) <= 4096 * 32  # the weight and its gradient, not 256 rows of logits
    whole = Llama(config, dtype)
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 2**28)
    expected = whole(tokens(4, 64), tokens(4, 64, seed=1))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    (3 * loss).backward()
    (3 * expected).backward()
    for name, weight in model.named_parameters():
        if dtype == torch.bfloat16 and "alpha" in name:
            continue  # a sum that cancels: its own rounding is a tenth of it
        error = (weight.grad - whole.get_parameter(name).grad).norm() / weight.grad.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize("activation", ["xielu", pytest.param("xielu_inverted", marks=pytest.mark.slow)])
def test_compiled_bf16_gradients_at_the_size_of_a_real_run(activation):
    """Matmuls and a softmax in place of the fused attention gave NaN here (torch 2.13), at no smaller size."""
    config = ModelConfig(dim=128, n_layers=1, n_heads=2, n_kv_heads=2, ffn_dim=576, activation=activation)
    exact, compiled = Llama(config), Llama(config, torch.bfloat16)
    compiled.compile_parts()
    for model in (exact, compiled):
        model(tokens(8, 256, 257), tokens(8, 256, 257, seed=1)).backward()
    for (name, weight), other in zip(exact.named_parameters(), compiled.parameters()):
        if "alpha" not in name:
            assert (other.grad - weight.grad).norm() < 0.05 * weight.grad.norm(), name


def test_tied_and_untied():
    tied, untied = Llama(ModelConfig(**TINY)), Llama(ModelConfig(**TINY, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed_tokens.weight
    assert untied.num_parameters() == tied.num_parameters() + 31 * 32


@pytest.mark.parametrize("activation", ["xielu", "swiglu"])
def test_compiled_parts_equal_eager_and_keep_names(activation):
    model = Llama(ModelConfig(**TINY, activation=activation), seed=0)
    names = list(model.state_dict())
    runs = []
    for _ in range(2):
        model.zero_grad()
        loss = model(tokens(), tokens(seed=1))
        loss.backward()
        runs.append([loss.detach(), *(weight.grad.clone() for weight in model.parameters())])
        model.compile_parts()
    assert list(model.state_dict()) == names
    for eager, compiled in zip(*runs):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_activation_scalars_and_effective_alphas():
    model = Llama(ModelConfig(**TINY, activation="xielu"))
    assert len(model.activation_scalars()) == 4
    assert model.effective_alphas() == {"alpha_p": pytest.approx([0.8] * 2), "alpha_n": pytest.approx([0.8] * 2)}
    assert Llama(ModelConfig(**TINY, activation="relu2")).effective_alphas() == {}
    assert Llama(ModelConfig(**TINY, activation="silu")).activation_scalars() == []
