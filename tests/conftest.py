"""Fixtures shared by the whole suite: golden cases and, built once a session, the example's engine."""

import contextlib
import os
import signal
from pathlib import Path

# A shell starts what runs in the background with these ignored, nohup too; the tests send them to programs of ours.
for _number, _usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    with contextlib.suppress(ValueError):  # not the main thread
        if signal.getsignal(_number) == signal.SIG_IGN:
            signal.signal(_number, _usual)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
TINY = ROOT / "examples" / "ngpt-tiny"
HF_CASES = ("gqa", "gqa-left-padded", "llama3-rope-bias", "dead-mlp")
ALL_CASES = (*HF_CASES, "research-checkpoint", "research-train-py")


SLOW_FILES = (
    "tests/engines/test_outside_runtime.py",
    "tests/export/plugins/test_numerics.py",  # compiles the kernels for the CPU first
    # A real server, processes that are stopped by signals, and deadlines: minutes, and other tests beside them disturb them.
    "tests/test_hostile_files.py",
    "tests/test_killed_builds.py",
    "tests/test_signals.py",
    "tests/test_soak.py",
    "tests/test_ci_recipes.py",
    "tests/openai/test_commands.py",
    "tests/openai/test_endpoints.py",
    "tests/openai/test_ends.py",
    "tests/openai/test_evaluation.py",
    "tests/openai/test_helpers.py",
    "tests/openai/test_special_tags.py",
    "tests/triton_repo/test_command.py",
    "tests/triton_repo/test_layout.py",
    "tests/triton_repo/test_metrics.py",
    "tests/triton_repo/test_nvidia_frontend.py",
    "tests/triton_repo/test_probe.py",
    "tests/triton_repo/test_server.py",
    "tests/triton_repo/test_serving.py",
    "tests/triton_repo/test_tensorrt_llm.py",
    "tests/triton_repo/test_verify_served.py",
)
SLOW = {
    "tests/engines/test_engine.py": ("test_a_research_model_of_short_context_is_built_and_passes",),
    "tests/engines/test_plan.py": (
        "test_one_layer_of_the_8b_shape_builds",
        "test_every_compute_capability_the_library_offers",
        "test_the_portable_onnx_graph_goes_through_tensorrts_parser",
        "test_narrow_weights_stay_narrow_in_the_plan",
        "test_every_precision_of_a_target_builds",
    ),
    "tests/engines/test_memory.py": ("test_it_is_about_the_size_of_a_graph_and_of_a_plan",),
    "tests/engines/test_other_tools.py": (
        "test_heads_of_any_size_make_a_verified_engine_that_runs_here_and_in_onnxruntime_genai",
    ),
    "tests/engines/test_record.py": ("test_a_further_format_of_weights_is_one_entry",),
    "tests/engines/test_tensorrt_whole.py": (
        "test_golden_tokens_from_a_built_engine",
        "test_verify_passes_a_right_engine_in_every_precision",
    ),
    "tests/engines/test_store.py": ("test_what_was_built_is_found_and_not_built_again",),
    "tests/engines/test_text_ends.py": ("test_an_engine_without_a_tokenizer_is_served_for_tokens",),
    "tests/engines/test_trtllm.py": (
        "test_an_engine_with_an_fp8_cache_is_built_and_described",
        "test_such_an_engine_is_not_run_here",
        "test_a_build_that_fails_shows_its_last_lines_and_leaves_nothing",
    ),
    "tests/export/plugins/test_ptx.py": ("test_assembles_for_every_architecture_without_spills",),
    "tests/export/plugins/test_registration.py": ("test_registration_under_tensorrts_own_code",),
    "tests/gpu/test_driver.py": ("test_a_launch",),
    "tests/gpu/test_rehearsal.py": ("test_kernels", "test_model"),
    "tests/gpu/test_rtx.py": ("test_every_row_of_the_section",),
    "tests/ngpt/test_model.py": (
        "test_flex_attention_agrees_with_eager",
        "test_trust_remote_code_loads_and_generates_without_this_package",
    ),
    "tests/ngpt/test_folders.py": ("test_what_is_read_can_be_loaded_converted_and_compared",),
    "tests/ngpt/test_off_sphere.py": (
        "test_a_small_deviation_is_built_as_it_is_and_the_worst_tensor_is_named",
        "test_a_large_deviation_is_built_on_demand_and_agrees_with_what_was_built",
        "test_zero_embeddings_as_vocabularies_are_padded_with_are_built_on_demand",
    ),
    "tests/ngpt/test_registration.py": ("test_every_order_of_imports_registers",),
    "tests/parity/test_gate.py": (
        "test_a_broken_quantised_engine_fails",
        "test_a_broken_engine_with_a_cache_fails",
        "test_a_broken_engine_fails_by_its_logits_alone",
        "test_a_faithful_engine_with_a_cache_passes_64_decode_steps",
        "test_the_check_fits_itself_to_the_context",
        "test_an_engine_with_fewer_bits_than_it_claims_fails",
        "test_small_and_rare_faults_fail",
    ),
    "tests/parity/test_report.py": ("test_the_script_of_a_failed_report_runs_and_shows_the_fault",),
    "tests/test_verify_ci.py": (
        "test_the_example_is_as_good_and_as_small_as_it_was",
        "test_the_perplexity_of_a_file_is_that_of_both",
        "test_speed_is_measured_against_pytorch_and_compared",
    ),
    "tests/test_cli.py": ("test_build_verifies_every_cpu_target",),
    "tests/test_commands.py": (
        "test_a_limit_of_file_sizes_is_named_and_nothing_stays",
        "test_a_missing_library_of_any_kind_is_one_line_that_says_how_to_install_it",
    ),
    "tests/test_doctor.py": ("test_this_machine_can_build_for_its_cpu",),
    "tests/test_docs.py": (
        "test_readme_commands_and_python_run",
        "test_the_site_has_every_guide_and_every_public_name",
        "test_links_to_files_of_code_work_in_the_site",
    ),
    "tests/trtllm/test_kv_cache.py": (
        "test_in_every_precision_it_adds_that_rounding_to_the_precisions_own",
        "test_rounding_of_keys_and_values_is_all_it_costs",
        "test_a_scale_four_times_too_small_saturates_and_is_noticed",
    ),
}
"""Tests that take four seconds and more, with all their cases (`pytest --durations`): marked `slow`, and left out by `make test-fast`."""


def pytest_collection_modifyitems(items):
    """Mark what is slow, in one place, from measured times."""
    for item in items:
        path = item.path.relative_to(ROOT).as_posix() if item.path.is_relative_to(ROOT) else ""
        if path in SLOW_FILES or item.originalname in SLOW.get(path, ()):
            item.add_marker(pytest.mark.slow)


class Golden:
    """A golden case: `folder`, and the arrays of golden.npz; `mask` is all ones where the case has none."""

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, GOLDEN / name
        with np.load(self.folder / "golden.npz") as data:
            self.arrays = {key: data[key] for key in data.files}
        self.ids = self.arrays["input_ids"].astype(np.int64)
        self.mask = self.arrays.get("attention_mask", np.ones_like(self.ids)).astype(np.int64)
        self.real = self.mask.astype(bool)

    def __getattr__(self, key: str):
        return self.arrays[key]


@pytest.fixture(params=HF_CASES)
def hf_case(request):
    return Golden(request.param)


@pytest.fixture(params=ALL_CASES)
def golden(request):
    return Golden(request.param)


@pytest.fixture(scope="session")
def tiny_engine_folder(tmp_path_factory):
    """The example's cpu-int8 engine, built and verified once."""
    from engines.build import build_engine

    return build_engine(TINY, "cpu-int8", tmp_path_factory.mktemp("engine") / "ngpt-tiny")
