"""model.py: its sizes, the paper's initialisation, and the arithmetic against plain formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

import model as model_module
from activations import ACTIVATIONS, Activation, check_activation, facts_of
from model import IGNORE, Llama, ModelConfig, apply_rope, chunk_rows
from train import Config, make_optimizers, update

TINY = dict(dim=32, n_layers=2, n_heads=4, n_kv_heads=4, ffn_dim=48, vocab_size=31, seq_len=16)


def tokens(batch=2, length=16, vocab=31, seed=0):
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def loss_and_gradients(model, ids, targets):
    model.zero_grad()
    loss = model(ids, targets)
    loss.backward()
    return [loss.detach(), *(weight.grad.clone() for weight in model.parameters())]


def test_sizes():
    """test_train.py::test_shipped_configs has those of the paper."""
    assert ModelConfig(ffn_dim=1537, activation="xielu").mlp_dim == 1537
    tied, untied = Llama(ModelConfig(**TINY)), Llama(ModelConfig(**TINY, tie_embeddings=False))
    assert untied.num_parameters() == tied.num_parameters() + 31 * 32
    assert untied.flops_per_token() == tied.flops_per_token()


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


def test_rope_turns_pairs():
    """By angles in float32, in a bf16 model too."""
    model = Llama(ModelConfig(**TINY | dict(seq_len=4096)), torch.bfloat16)
    cos, sin = model.cos, model.sin
    assert cos.dtype == sin.dtype == torch.float32
    angles = torch.arange(4096).double()[:, None] * 500000.0 ** -(torch.arange(4).double() / 4)
    torch.testing.assert_close(cos.double(), angles.cos(), rtol=0, atol=1e-3)
    x = torch.randn(1, 1, 64, 8)
    turned = apply_rope(x, cos[:64], sin[:64])
    as_complex = torch.complex(*x.double().chunk(2, dim=-1)) * torch.exp(1j * angles[:64])
    torch.testing.assert_close(turned.double(), torch.cat((as_complex.real, as_complex.imag), -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("n_kv_heads", [4, 2])
def test_forward_against_plain_formulas(n_kv_heads):
    config = ModelConfig(**TINY | dict(n_kv_heads=n_kv_heads), activation="relu2")
    model = Llama(config, seed=5)
    weights = {name: weight.detach().double() for name, weight in model.state_dict().items()}
    ids = tokens()

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + config.norm_eps).sqrt() * gain

    x = weights["embed_tokens.weight"][ids]
    for number in range(config.n_layers):
        w = {name.split(".", 2)[2]: value for name, value in weights.items() if name.startswith(f"layers.{number}.")}
        h = norm(x, w["input_layernorm.weight"])
        q, k, v = ((h @ w[f"self_attn.{name}_proj.weight"].T).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv")
        q, k = (apply_rope(x, model.cos.double(), model.sin.double()) for x in (q, k))
        k, v = (x.repeat_interleave(4 // n_kv_heads, dim=1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) / math.sqrt(8)).masked_fill(torch.ones(16, 16).triu(1).bool(), -math.inf)
        x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"])
        x = x + (h @ w["mlp.up_proj.weight"].T).clamp(min=0).square() @ w["mlp.down_proj.weight"].T
    logits = norm(x, weights["norm.weight"]) @ weights["embed_tokens.weight"].T
    torch.testing.assert_close(model(ids).double(), logits, rtol=1e-4, atol=1e-5)
    loss = F.cross_entropy(logits.flatten(0, 1), ids.flatten())
    assert model(ids, ids).item() == pytest.approx(loss.item(), rel=1e-5)


def test_bf16_is_close_and_its_weights_stay_float32():
    exact, rounded = Llama(ModelConfig(**TINY), seed=0), Llama(ModelConfig(**TINY), torch.bfloat16, seed=0)
    assert rounded(tokens()).dtype == torch.bfloat16
    loss = rounded(tokens(), tokens(seed=1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact(tokens(), tokens(seed=1)).item(), rel=1e-2)
    loss.backward()
    assert all(weight.dtype == weight.grad.dtype == torch.float32 for weight in rounded.parameters())


@pytest.mark.parametrize("activation", ["xielu", "swiglu"])
def test_loss_compiled_or_in_chunks_ignores_padding(monkeypatch, activation):
    """It and its gradients are those of the eager model that computes all logits at once, under the same names."""
    model = Llama(ModelConfig(**TINY, activation=activation), seed=0)
    names = list(model.state_dict())
    targets = tokens(seed=1)
    targets[1, 5:] = IGNORE
    results = []
    for compiled in (False, True):
        if compiled:
            model.compile_parts()
        for limit in (2**28, 31 * 5):
            monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", limit)
            results.append(loss_and_gradients(model, tokens(), targets))
            total = model(tokens(), targets, reduction="sum")
            assert total.item() == pytest.approx(results[-1][0].item() * 21, rel=1e-5)
            torch.testing.assert_close(results[-1], results[0], rtol=1e-4, atol=1e-6)
    assert list(model.state_dict()) == names


CHUNKS = [
    (20480, 147456, 80 * 2**30, 20480),  # the 1.1B model on an H100: all at once
    (20480, 147456, 24 * 2**30, 10240),
    (20480, 147456, None, 5120),  # three chunks would be small enough, but three do not divide the rows
    (0, 257, None, 1),
    (7, 2**31, None, 1),
]


@pytest.mark.parametrize("rows, vocab, memory, expected", CHUNKS)
def test_chunks_are_equal(rows, vocab, memory, expected):
    assert chunk_rows(rows, vocab, memory) == expected


def test_loss_in_chunks_holds_a_chunk_of_logits(monkeypatch):
    model, kept = Llama(ModelConfig(**TINY | dict(vocab_size=4096, seq_len=64))), []
    monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", 4096 * 8)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda x: x)
    with hooks:
        model(tokens(4, 64), tokens(4, 64, seed=1))
    assert max(kept) <= 4096 * 32  # the weight, not 256 rows of logits


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlps_are_one_graph(activation):
    """Forward, backward and without gradients, captured by torch.compile and left as they are."""
    mlp, x = Llama(ModelConfig(**TINY, activation=activation), seed=0).layers[0].mlp, torch.randn(2, 16, 32)
    torch._dynamo.reset()
    graph = torch.compile(mlp, backend="eager", fullgraph=True)
    grads = [torch.autograd.grad(f(x).square().sum(), mlp.parameters()) for f in (graph, mlp)]
    torch.testing.assert_close(*grads)
    with torch.no_grad():
        torch.testing.assert_close(graph(x), mlp(x))


class Mixed(torch.nn.Module):
    """Per channel a mixture of x and relu(x)², and of both a 2-D matrix."""

    def __init__(self, width):
        super().__init__()
        self.gain = torch.nn.Parameter(torch.ones(width))
        self.mix = torch.nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        mixed = torch.stack([x, torch.relu(x) ** 2], dim=-1) @ self.mix.to(x.dtype)
        return (mixed.sum(-1) * self.gain).to(x.dtype)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_an_activation_with_a_matrix_and_a_parameter_per_channel(monkeypatch, optimizer):
    monkeypatch.setitem(ACTIVATIONS, "mixed", Activation("a mixture", Mixed))
    config = Config(**TINY, activation="mixed", optimizer=optimizer, weight_decay=0.5)
    check_activation("mixed", config.mlp_dim, compiles=True)
    assert facts_of("mixed") == facts_of("mixed")
    model, same, other = Llama(config, seed=1), Llama(config, seed=1), Llama(config, seed=2)
    mix, gain = model.layers[1].mlp.act_fn.mix, model.layers[1].mlp.act_fn.gain
    assert mix.std() > 0.1 and gain.shape == (48,)  # as the module drew them, and not as the weights of a layer
    assert torch.equal(mix, same.layers[1].mlp.act_fn.mix) and not torch.equal(mix, other.layers[1].mlp.act_fn.mix)
    optimizers = make_optimizers(model, config)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    decay = {id(weight): group["weight_decay"] for group in groups for weight in group["params"]}
    assert decay == {id(weight): 0.0 if "act_fn" in name else 0.5 for name, weight in model.named_parameters()}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    before, losses = [mix.detach().clone(), gain.detach().clone()], []
    for _ in range(5):
        loss, *_ = loss_and_gradients(model, tokens(), tokens(seed=1))
        losses.append(loss)
        update(optimizers, 1e-2)
    assert losses[-1] < losses[0] and not torch.equal(mix, before[0]) and not torch.equal(gain, before[1])
