"""Fixtures that several test files share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# No test depends on the network: a test that wants the hub says so by replacing it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


@pytest.fixture(autouse=True)
def _reproducible() -> Iterator[None]:
    """One thread (two workers share the machine), one seed and no width of a terminal; the generator comes back as it was."""
    torch.set_num_threads(1)
    os.environ.pop("COLUMNS", None)
    state = torch.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.set_rng_state(state)


@pytest.fixture
def generator() -> torch.Generator:
    """A CPU generator with seed 0, for random numbers of a test."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def real_data() -> Path:
    """The folder of real data; the test is skipped where there is none."""
    folder = os.environ.get("ROBUSTLIP_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("needs real data: set ROBUSTLIP_DATA to a folder with mnist_subset, cifar10_subset and tiny_shakespeare")
    return Path(folder)

# Tests of many cases that take seconds each: `make test` runs every n-th of them, `make test-all` all.
EVERY_NTH = {
    "test_capture.py::test_radii_are_those_of_the_network_written_by_hand": 6,
    "test_capture.py::test_a_capture_gives_the_modules_bits": 3,
    "test_capture.py::test_no_attack_succeeds_inside_the_radius_of_a_module": 8,
    "test_capture.py::test_elementwise_functions": 3,
    "test_products.py::test_captured_gates_are_attacked_inside_their_radii": 6,
    "test_attention_forms.py::test_certified_radii_of_models_with_every_form_withstand_attacks": 3,
    "test_attention_forms.py::test_a_single_token_of_every_form_agrees_with_all_and_is_never_exceeded": 3,
    "test_joins.py::test_every_method_covers_joins_and_no_attack_gets_inside": 4,
    "test_joins.py::test_joins_in_half_precision_keep_what_is_proved": 3,
    "test_mapped.py::test_radii_are_those_of_the_dense_network": 8,
    "test_mlp_certifiers.py::test_no_attack_succeeds_inside_the_radius": 3,
    "test_mlp_certifiers.py::test_every_rivals_bound_is_below_every_margin_in_the_ball": 3,
    "test_mlp_certifiers.py::test_lines_bands_and_slopes_hold_in_forty_digits": 3,
    "test_mlp_certifiers.py::test_bounds_on_a_line_are_below_every_point_of_it": 3,
    "test_local.py::test_no_attack_succeeds_inside_a_certified_radius": 8,
    "test_zoo.py::test_show_states_accuracy_and_the_bound_of_the_weights": 3,
    "test_convnets.py::test_no_attack_gets_inside_a_radius": 3,
    "test_conv.py::test_no_attack_succeeds_inside_a_certified_radius_of_a_convolutional_network": 3,
    "test_certify.py::test_no_attack_succeeds_inside_a_certified_radius": 3,
    "test_independent.py::test_certified_balls_in_the_plane_are_proved_by_subdivision": 3,
    "test_lipsdp.py::test_no_attack_succeeds_inside_a_radius": 3,
    "test_new_operation.py::test_every_method_covers_a_registered_operation": 3,
    "test_rules_contract.py::test_change_is_never_exceeded": 5,
    "test_rules_contract.py::test_weight_perturbations_are_never_exceeded": 4,
    "test_order.py::test_single_tokens_answer_the_same_in_any_order": 8,
    "test_pretrained.py::test_a_family_is_loaded_certified_and_attacked": 6,
    "test_local.py::test_two_percent_more_is_broken_near_the_boundary": 8,
    "test_local.py::test_one_token_sequences": 2,
    "test_moves.py::test_samples_of_every_rank_are_bounded_or_refused": 2,
    "test_nothing_changes.py::test_nothing_of_the_callers_changes": 2,
    "test_overflow.py::test_no_bound_is_finite_where_execution_is_not": 2,
    "test_mlp_certifiers.py::test_better_methods_prove_no_less": 3,
    "test_mlp_certifiers.py::test_curvature_and_minimum_are_those_of_forty_digits": 2,
    "test_attacks_in_half.py::test_half_precision_is_attacked_as_well_as_float32": 3,
    "test_executed_errors.py::test_every_method_covers_the_worst_errors_of_execution": 2,
    "test_executed_errors.py::test_executed_logits_lie_within_the_bounds_at_a_point": 5,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the cases of EVERY_NTH that `make test` leaves out as slow."""
    seen: dict[str, int] = {}
    for item in items:
        name = f"{item.path.name}::{getattr(item, 'originalname', item.name)}"
        if name in EVERY_NTH:
            seen[name] = seen.get(name, -1) + 1
            if seen[name] % EVERY_NTH[name]:
                item.add_marker(pytest.mark.slow)
