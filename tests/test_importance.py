"""The importance matrix: against transformers' own hidden states, by what scaling a row must do, and what it is good for."""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import pytest
import torch

from myna.errors import DataError, ModelError
from myna.export.encoder import encode
from myna.export.importance import importance_keys, measure_importance
from myna.model.families import FAMILIES, gguf_name

LLAMA = FAMILIES["llama"]
VOCAB = 90
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
FALCON = {"new_decoder_architecture": True, "num_kv_heads": 2, "ffn_hidden_size": 96}


def new_model(model_type: str = "llama", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = SIZES | (FALCON if model_type == "falcon" else {}) | changes
    config = AutoConfig.for_model(model_type, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def new_rows(num_rows: int, seed: int = 0) -> list[list[int]]:
    random_ = np.random.default_rng(seed)
    return [[int(i) for i in random_.integers(0, VOCAB, 5 + 3 * index)] for index in range(num_rows)]


def test_it_is_the_mean_square_of_what_the_layer_reads() -> None:
    """What q, k and v read is the normed hidden state, which transformers gives out."""
    model, rows = new_model(), new_rows(3)
    measured = measure_importance(model, LLAMA, rows)
    with torch.no_grad():
        for layer, block in enumerate(model.model.layers):
            hidden = [
                model(torch.tensor([row]), output_hidden_states=True).hidden_states[layer] for row in rows
            ]
            inputs_TC = torch.cat([block.input_layernorm(states)[0] for states in hidden])
            expected = inputs_TC.double().square().mean(0).float().numpy()
            for name in ("attn_q", "attn_k", "attn_v"):
                np.testing.assert_allclose(measured[f"blk.{layer}.{name}.weight"], expected, rtol=1e-5)


def test_three_times_the_input_is_nine_times_the_importance() -> None:
    model, rows = new_model(), new_rows(3)
    before = measure_importance(model, LLAMA, rows)
    last = model.model.layers[1]
    with torch.no_grad():
        last.mlp.up_proj.weight[5] *= 3  # column 5 of what ffn_down reads
        model.model.layers[1].self_attn.v_proj.weight[16 + 2] *= (
            3  # value 2 of the second key head: query heads 2 and 3
        )
    after = measure_importance(model, LLAMA, rows)
    ratio = after["blk.1.attn_output.weight"] / before["blk.1.attn_output.weight"]
    expected = np.ones(64)
    expected[[2 * 16 + 2, 3 * 16 + 2]] = 9
    np.testing.assert_allclose(ratio, expected, rtol=1e-4)
    np.testing.assert_array_equal(after["blk.0.ffn_down.weight"], before["blk.0.ffn_down.weight"])
    assert after["blk.1.ffn_down.weight"][5] > 7 * before["blk.1.ffn_down.weight"][5]


def test_every_token_counts_alike() -> None:
    model, (short, long) = new_model(), (new_rows(1)[0], new_rows(5)[4])
    apart = [measure_importance(model, LLAMA, [row])["blk.0.ffn_up.weight"] for row in (short, long)]
    together = measure_importance(model, LLAMA, [short, [], long])["blk.0.ffn_up.weight"]
    weighted = (apart[0] * len(short) + apart[1] * len(long)) / (len(short) + len(long))
    np.testing.assert_allclose(together, weighted, rtol=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_matrix_of_a_familys_blocks_is_measured(model_type: str) -> None:
    model = new_model(model_type)
    measured = measure_importance(model, FAMILIES[model_type], new_rows(2))
    matrices = {
        gguf_name(FAMILIES[model_type], name): parameter.shape[1]
        for name, parameter in model.named_parameters()
        if parameter.dim() == 2
    }
    expected = {name: width for name, width in matrices.items() if name and name.startswith("blk.")}
    assert len(expected) >= 8 and {name: len(values) for name, values in measured.items()} == expected
    assert all(values.dtype == np.float32 and (values > 0).all() for values in measured.values())


def test_the_model_is_left_as_it_was() -> None:
    model, told = new_model(), []
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure_importance(model, LLAMA, new_rows(3), progress=lambda done, total: told.append((done, total)))
    assert model.training and told == [(1, 3), (2, 3), (3, 3)]
    assert not any(module._forward_pre_hooks for module in model.modules())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_halves_are_not_squared_as_halves() -> None:
    """What a half still holds (65,504 at most) its square does not."""
    model, rows = new_model(), new_rows(4)
    with torch.no_grad():
        block = model.model.layers[0]
        block.post_attention_layernorm.weight *= 1000
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight /= 1000
    exact = measure_importance(model, LLAMA, rows)
    rounded = measure_importance(model.to(torch.float16), LLAMA, rows)
    assert exact["blk.0.ffn_up.weight"].max() > 65504
    for name, values in exact.items():
        np.testing.assert_allclose(rounded[name], values, rtol=0.1)


@pytest.mark.parametrize("rows", [[], [[]]])
def test_rows_without_tokens_are_refused(rows: list[list[int]]) -> None:
    with pytest.raises(DataError, match="tokens"):
        measure_importance(new_model(), LLAMA, rows)


def test_what_is_not_finite_is_refused_and_nothing_stays_behind() -> None:
    model = new_model()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = torch.nan
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight.*finite"):
        measure_importance(model, LLAMA, new_rows(1))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_of_another_family_is_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        measure_importance(new_model(), FAMILIES["gpt_neox"], new_rows(1))


def test_the_keys_are_upstreams() -> None:
    keys = importance_keys({"blk.0.attn_q.weight": np.ones(3, np.float32)}, 12, "orders.jsonl")
    assert keys == {
        "quantize.imatrix.dataset": "orders.jsonl",
        "quantize.imatrix.entries_count": 1,
        "quantize.imatrix.chunks_count": 12,
    }


@pytest.mark.parametrize("ggml_type", ["Q2_K", "Q3_K", "IQ4_XS", "Q4_0"])
def test_weighed_weights_answer_more_like_the_model(ggml_type: str) -> None:
    """KL on rows that were not measured, in a model whose columns are used as unevenly as a trained one's."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "initializer_range": 0.1}
    model = new_model(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter).exp())
    importance = measure_importance(model, LLAMA, new_rows(20))
    exact = {name: value.clone() for name, value in model.state_dict().items()}
    probe = [row for row in new_rows(12, seed=7) if len(row) > 8]
    reference = answers(model, probe)
    divergence = []
    for weights in ({}, importance):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                ours = gguf_name(LLAMA, name) or ""
                if ours in importance:
                    blocks = encode(exact[name].numpy(), ggml_type, weights.get(ours))
                    decoded = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[ggml_type])
                    parameter.copy_(torch.from_numpy(decoded))
        other = answers(model, probe)
        divergence.append(float((reference.exp() * (reference - other)).sum(-1).mean()))
    assert divergence[1] < 0.9 * divergence[0], divergence


@torch.no_grad()
def answers(model: Any, rows: list[list[int]]) -> torch.Tensor:
    return torch.cat([model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows])
