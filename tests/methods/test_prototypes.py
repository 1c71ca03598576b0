"""Prototypes: against a float64 reference written from the formulas, additive, unknown, and the early stop."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save
from tests.tiny import new_model, tiny_config
from transformers import GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from meristem.errors import BadInput, Clash
from meristem.methods.architecture.prototypes import (
    Prototype,
    decoder_blocks,
    hidden_features,
    pool,
    summarise,
    weigh,
)
from meristem.methods.architecture.routing import features

WIDTH, LAMBDA, QUANTILE = 12, 0.4, 0.9


def draws(task, count=20, spread=1.0):
    """Prompts of a task: correlated dimensions of very different size."""
    draw = torch.Generator().manual_seed(task)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mean = 4 * torch.randn(WIDTH, generator=draw, dtype=torch.float64)
    found = mean + spread * torch.randn(count, WIDTH, generator=draw, dtype=torch.float64) @ mixing
    return (found * torch.logspace(-2, 2, WIDTH, dtype=torch.float64)).float()


def covariance(sets):
    """S and N of the module's formulas."""
    freedom = sum(len(each) - 1 for each in sets)
    centred = [each - each.mean(0) for each in sets]
    return sum(each.T @ each for each in centred) / freedom, freedom


def shrunk(scatter, diagonal):
    return (1 - LAMBDA) * scatter + LAMBDA * np.diag(diagonal)


def test_distances_and_radii_are_the_formulas():
    tasks = [draws(1), draws(2, 14), draws(3, 9)]
    exact = [task.double().numpy() for task in tasks]
    scatter, freedom = covariance(exact)
    diagonal = np.diag(scatter) * 1.0
    inverse = np.linalg.inv(shrunk(scatter, diagonal))
    pooled = pool([summarise(task) for task in tasks], LAMBDA, QUANTILE)

    asked = draws(4, 5)
    wanted = [
        [np.sqrt((f - task.mean(0)) @ inverse @ (f - task.mean(0))) for task in exact]
        for f in asked.double().numpy()
    ]
    np.testing.assert_allclose(pooled.distances(asked.double()).numpy(), wanted, rtol=1e-4)
    np.testing.assert_allclose(pooled.distances(asked).numpy(), wanted, rtol=1e-4)

    for at, task in enumerate(exact):  # each prompt really left out of its task's mean and of the covariance
        left_out = []
        for i in range(len(task)):
            rest = np.delete(task, i, axis=0)
            others = [rest if other is task else other for other in exact]
            smaller = sum((each - each.mean(0)).T @ (each - each.mean(0)) for each in others) / freedom
            gap = task[i] - rest.mean(0)
            left_out.append(np.sqrt(gap @ np.linalg.inv(shrunk(smaller, diagonal)) @ gap))
        assert pooled.radii[at].item() == pytest.approx(np.quantile(left_out, QUANTILE), rel=1e-4)


def test_weights_of_both_modes():
    prototypes = [summarise(draws(task)) for task in (1, 2, 3)]
    asked = torch.cat([draws(task, 24)[20:] for task in (1, 2, 3)])
    pooled = pool(prototypes)
    hard = weigh(prototypes, asked, "top-1", unknown=False)
    assert hard.argmax(1).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert torch.equal(hard.sum(1), torch.ones(12))
    assert torch.equal(hard, pooled.weigh(asked, "top-1", unknown=False))
    soft = pooled.weigh(asked, "softmax", temperature=50.0, unknown=False)
    wanted = np.exp(-(pooled.distances(asked).double().numpy() ** 2) / 100)
    np.testing.assert_allclose(soft.numpy(), wanted / wanted.sum(1, keepdims=True), rtol=1e-3, atol=1e-30)
    between = (prototypes[0].mean + prototypes[1].mean)[None] / 2
    halves = pooled.weigh(between, "softmax", temperature=100.0, unknown=False)[0]
    assert halves[0].item() == pytest.approx(halves[1].item(), rel=1e-3)


@pytest.mark.parametrize("mode", ["top-1", "softmax"])
def test_unseen_prompts_have_no_weight_and_own_ones_have(mode):
    pooled = pool([summarise(draws(task, 60)) for task in (1, 2)], quantile=1.0)
    own, unseen = draws(1, 120)[60:], 3 * draws(7, 60)
    known = pooled.weigh(own, mode).sum(1)
    assert (known > 0.5).float().mean() > 0.9
    assert pooled.weigh(unseen, mode).any(1).float().mean() < 0.1
    assert pooled.weigh(unseen, mode, unknown=False).sum(1).allclose(torch.ones(60))


def test_the_quantile_is_the_share_of_own_prompts_that_are_known():
    """Left out, not in sample: otherwise a fresh prompt would be unknown far more often than the quantile says."""
    pooled = pool([summarise(draws(task, 60)) for task in (1, 2, 3)], quantile=0.8)
    fresh = torch.cat([draws(task, 1060)[60:] for task in (1, 2, 3)])
    assert pooled.weigh(fresh).sum(1).mean().item() == pytest.approx(0.8, abs=0.07)


def test_a_task_more_leaves_the_others_as_they_are_and_needs_none_of_their_prompts():
    old = [summarise(draws(task)) for task in (1, 2)]
    saved = save({f"{at}.{name}": t for at, each in enumerate(old) for name, t in each.tensors().items()})
    back = load(saved)
    again = [
        Prototype.of_tensors({name: back[f"{at}.{name}"] for name in ("mean", "residuals", "n")})
        for at in (0, 1)
    ]
    new = summarise(draws(3))
    first, second = pool([*old, new]), pool([*again, new])
    asked = torch.cat([draws(task, 30)[20:] for task in (1, 2, 3)])
    assert torch.equal(first.distances(asked), second.distances(asked))
    assert torch.equal(first.radii, second.radii)
    assert saved == save(
        {f"{at}.{name}": t for at, each in enumerate(old) for name, t in each.tensors().items()}
    )


def test_the_unit_of_a_dimension_decides_nothing():
    factor = torch.ones(WIDTH)
    factor[3], factor[5] = 1000.0, 0.01
    plain = pool([summarise(draws(task)) for task in (1, 2)])
    scaled = pool([summarise(draws(task) * factor) for task in (1, 2)])
    torch.testing.assert_close(
        plain.distances(draws(4)), scaled.distances(draws(4) * factor), rtol=1e-2, atol=1e-3
    )


def test_a_row_is_weighed_by_itself_and_always_the_same():
    pooled, asked = pool([summarise(draws(task)) for task in (1, 2, 3)]), draws(2, 40)
    whole = pooled.weigh(asked, "softmax", temperature=20.0)
    assert torch.equal(whole, pooled.weigh(asked, "softmax", temperature=20.0))
    assert torch.equal(whole, pooled.like(asked).weigh(asked, "softmax", temperature=20.0))
    rows = torch.cat([pooled.weigh(row[None], "softmax", temperature=20.0) for row in asked])
    torch.testing.assert_close(whole, rows)


def test_of_identical_prototypes_the_earliest_is_taken():
    same = summarise(draws(1))
    weights = weigh([same, copy.deepcopy(same), summarise(draws(2))], draws(1), unknown=False)
    assert weights[:, 0].all() and not weights[:, 1:].any()


def test_a_task_of_one_prompt_borrows_the_widest_radius():
    one, many, more = summarise(draws(1, 1)), summarise(draws(2)), summarise(draws(3))
    pooled = pool([one, many, more])
    assert pooled.radii[0] == pooled.radii[1:].max()
    assert pooled.weigh(draws(1, 1)).tolist() == [[1, 0, 0]]
    alone = pool([one])  # nothing is known of distances
    assert alone.weigh(draws(5)).all()


def test_prompts_that_are_all_the_same_are_no_division_by_zero():
    same = summarise(torch.ones(5, WIDTH))
    assert weigh([same], torch.ones(2, WIDTH)).tolist() == [[1], [1]]
    assert not weigh([same], torch.ones(2, WIDTH) + 1).any()


def test_only_so_many_residuals_are_kept_and_the_mean_is_of_all():
    prompts = draws(1, 200)
    made = summarise(prompts, kept=10)
    assert made.residuals.shape == (10, WIDTH) and made.n == 200
    torch.testing.assert_close(made.mean, prompts.double().mean(0).float())
    assert summarise(prompts[:7], kept=10).residuals.shape == (7, WIDTH)


def test_bad_input_is_refused():
    with pytest.raises(BadInput, match="nothing to route to"):
        pool([])
    with pytest.raises(BadInput, match="shrinkage=0"):
        pool([summarise(draws(1))], shrinkage=0)
    with pytest.raises(BadInput, match="quantile=1"):
        pool([summarise(draws(1))], quantile=1.5)
    with pytest.raises(BadInput, match="prototype 1 has mean"):
        pool([summarise(draws(1)), summarise(draws(2)[:, :5])])
    with pytest.raises(BadInput, match="features"):
        summarise(torch.zeros(0, WIDTH))
    with pytest.raises(BadInput, match="not finite"):
        summarise(torch.full((2, WIDTH), torch.nan))
    with pytest.raises(BadInput, match="without residuals"):
        Prototype.of_tensors({"mean": torch.zeros(3), "n": torch.tensor(1)})


# ---- features ------------------------------------------------------------------------------------------------


def rotary():
    config = tiny_config()
    config.num_hidden_layers = 3
    return LlamaForCausalLM(config)


def learned_positions():
    return GPT2LMHeadModel(GPT2Config(vocab_size=259, n_embd=16, n_layer=3, n_head=2, n_positions=64))


@pytest.fixture(params=[rotary, learned_positions])
def model(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return request.param().eval()


def prompts():
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(3, 259, (length,), generator=draw) for length in (9, 1, 17, 4, 9)]


@torch.no_grad()
def whole(model, depth):
    """From the full model, row by row: no padding, no early stop."""
    states = [model(row[None], output_hidden_states=True).hidden_states[depth][0] for row in prompts()]
    return torch.stack([mean_direction(state) for state in states])


def mean_direction(state):
    exact = state.double()
    return (exact / exact.square().mean(-1, keepdim=True).sqrt()).mean(0).float()


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_the_early_stop_gives_the_hidden_states_of_the_whole_model(model, depth, batch_size):
    torch.testing.assert_close(
        hidden_features(model, prompts(), depth, batch_size), whole(model, depth), rtol=1e-5, atol=1e-6
    )


def test_after_the_last_block_comes_no_final_norm(model):
    blocks, seen = decoder_blocks(model), []
    hook = blocks[-1].register_forward_hook(
        lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    row = prompts()[0]
    with torch.no_grad():
        model(row[None])
    hook.remove()
    torch.testing.assert_close(
        hidden_features(model, [row], 3)[0], mean_direction(seen[0].reshape(len(row), -1))
    )


def test_depth_0_is_the_mean_input_embedding(model):
    assert torch.equal(hidden_features(model, prompts(), 0), features(model, prompts()))


def test_only_the_first_blocks_run_and_nothing_stays_behind(model):
    ran = []
    for at, block in enumerate(decoder_blocks(model)):
        block.register_forward_pre_hook(lambda module, inputs, at=at: ran.append(at))
    hooks = [len(block._forward_hooks) for block in decoder_blocks(model)]
    hidden_features(model, prompts(), 2)
    assert ran == [0, 1]
    assert hooks == [len(block._forward_hooks) for block in decoder_blocks(model)]


def test_dropout_is_off_and_the_mode_of_every_part_comes_back():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = learned_positions()
    for at, part in enumerate(model.modules()):
        part.training = at % 3 > 0
    modes = {name: part.training for name, part in model.named_modules()}
    assert len(set(modes.values())) == 2
    found = hidden_features(model, prompts(), 2)
    assert modes == {name: part.training for name, part in model.named_modules()}
    assert torch.equal(found, hidden_features(model.eval(), prompts(), 2))


def test_a_peft_model_with_its_adapter_off_gives_the_features_of_the_base():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        base, adapted = (
            new_model(),
            get_peft_model(
                new_model(),
                LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
            ),
        )
    with adapted.disable_adapter():
        off = hidden_features(adapted, prompts(), 1)
    assert torch.equal(off, hidden_features(base, prompts(), 1))
    assert not torch.allclose(off, hidden_features(adapted, prompts(), 1))


def test_what_cannot_be_asked_for_is_refused(model):
    with pytest.raises(BadInput, match="0 to 3"):
        hidden_features(model, prompts(), 4)
    with pytest.raises(BadInput, match="without tokens"):
        hidden_features(model, [torch.tensor([], dtype=torch.long)], 1)
    model.config.num_hidden_layers = 7
    with pytest.raises(Clash, match="no list of 7 blocks"):
        hidden_features(model, prompts(), 1)
