"""Scheduler files and names: read as diffusers reads them, or refused with a message that says what to do."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import types
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sd_runtime.errors import BundleError, UsageError
from sd_runtime.sampling import SchedulerConfig, describe, make_plan, resolve
from sd_runtime.sampling.names import SchedulerChoice
from sd_runtime.sampling.options import ACCEPTED
from sd_runtime.sampling.registry import PRESETS, SAMPLERS

COMPARED = [(sampler.diffusers_class, sampler) for sampler in SAMPLERS if sampler.diffusers_class is not None]
HONOURED = {class_name: sampler.honoured for class_name, sampler in COMPARED}
FIXED = {class_name: sampler.fixed for class_name, sampler in COMPARED}
STABLE_DIFFUSION = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def diffusers_class(class_name: str) -> Any:
    """A scheduler class; DPMSolverSDEScheduler imports torchsde, which need not be installed."""
    if class_name == "DPMSolverSDEScheduler":
        missing = "torchsde" not in sys.modules
        if missing:
            sys.modules["torchsde"] = types.ModuleType("torchsde")
        try:
            return importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde").DPMSolverSDEScheduler
        finally:
            if missing:
                del sys.modules["torchsde"]
    return getattr(importlib.import_module("diffusers"), class_name)


# ---- the tables, against diffusers' constructors ---------------------------------------------------------------------

INERT = {  # options that cannot change the result, given what FIXED demands
    "dynamic_thresholding_ratio": "only with thresholding",
    "sample_max_value": "only with thresholding",
    "clip_sample_range": "only with clip_sample",
    "flow_shift": "only with use_flow_sigmas",
    "time_shift_type": "only with use_dynamic_shifting",
}
INERT_OF = {
    "LCMScheduler": {"timestep_spacing", "steps_offset", "set_alpha_to_one"},
    "TCDScheduler": {
        *("timestep_spacing", "steps_offset", "set_alpha_to_one"),  # as in LCM
        *("clip_sample", "thresholding", "timestep_scaling"),  # never read
    },
}


@pytest.mark.parametrize("class_name", HONOURED)
def test_every_option_of_diffusers_is_accounted_for(class_name: str) -> None:
    parameters = inspect.signature(diffusers_class(class_name).__init__).parameters
    theirs = {name: parameter.default for name, parameter in parameters.items() if name != "self"}
    inert = set(INERT) | INERT_OF.get(class_name, set())
    honoured, fixed = HONOURED[class_name], set(FIXED[class_name])
    assert set(theirs) - inert == set(honoured) | fixed
    assert not set(honoured) & fixed
    assert honoured == {name: theirs[name] for name in honoured}
    for name in fixed - {"clip_sample", "skip_prk_steps"}:  # whose defaults are dealt with one by one, below
        assert theirs[name] in ACCEPTED[name]


@pytest.mark.parametrize("class_name", HONOURED)
def test_a_file_of_nothing_but_the_class_gives_the_defaults(class_name: str) -> None:
    raw = {"_class_name": class_name, "skip_prk_steps": True}
    config = SchedulerConfig.from_dict(raw)
    for key, value in HONOURED[class_name].items():
        assert getattr(config, key) == (1 if key == "steps_offset" else value)


# ---- switching: from_config ------------------------------------------------------------------------------------------

FILES: dict[str, dict[str, Any]] = {
    "stable-diffusion-v1-5": STABLE_DIFFUSION,
    "stable-diffusion-2-1": {
        "_class_name": "DDIMScheduler",
        **{key: STABLE_DIFFUSION[key] for key in STABLE_DIFFUSION if key != "_class_name"},
        "prediction_type": "v_prediction",
    },
    "sd-turbo": {
        **STABLE_DIFFUSION,
        "_class_name": "EulerDiscreteScheduler",
        "interpolation_type": "linear",
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "timestep_spacing": "trailing",
        "use_karras_sigmas": False,
    },
    "saved by DPM++ 2M Karras": {
        **STABLE_DIFFUSION,
        "_class_name": "DPMSolverMultistepScheduler",
        "algorithm_type": "dpmsolver++",
        "dynamic_thresholding_ratio": 0.995,
        "euler_at_final": False,
        "lambda_min_clipped": float("-inf"),
        "lower_order_final": True,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "solver_order": 2,
        "solver_type": "midpoint",
        "thresholding": False,
        "timestep_spacing": "linspace",
        "use_karras_sigmas": True,
        "use_lu_lambdas": False,
        "variance_type": None,
    },
    "saved by UniPC": {
        **STABLE_DIFFUSION,
        "_class_name": "UniPCMultistepScheduler",
        "disable_corrector": [],
        "predict_x0": True,
        "solver_order": 3,
        "solver_p": None,
        "solver_type": "bh2",
        "timestep_spacing": "leading",
    },
    "LCM_Dreamshaper_v7": {
        "_class_name": "LCMScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "original_inference_steps": 50,
        "prediction_type": "epsilon",
        "rescale_betas_zero_snr": False,
        "steps_offset": 1,
        "thresholding": False,
        "timestep_scaling": 10.0,
        "timestep_spacing": "leading",
        "skip_prk_steps": True,
    },
    "notes what was not set": {
        **STABLE_DIFFUSION,
        "timestep_spacing": "leading",
        "prediction_type": "epsilon",
        "_use_default_values": ["timestep_spacing", "prediction_type"],
    },
}


@pytest.mark.parametrize("class_name", HONOURED)
@pytest.mark.parametrize("file", FILES)
def test_switching_is_from_config(file: str, class_name: str) -> None:
    raw = json.loads(json.dumps(FILES[file]))
    theirs = diffusers_class(class_name).from_config(raw).config
    ours = SchedulerConfig.from_dict(raw).switched(SchedulerChoice(class_name, {}, ""))
    assert {key: getattr(ours, key) for key in HONOURED[class_name]} == {
        key: theirs[key] for key in HONOURED[class_name]
    }


def test_switching_back_gives_the_file() -> None:
    for raw in FILES.values():
        config = SchedulerConfig.from_dict(raw)
        there = config.switched(resolve("euler_a"))
        assert there.switched(SchedulerChoice(config.class_name, {}, "")) == config


@pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
@pytest.mark.parametrize("steps_offset", [None, 0, 1, 2])
@pytest.mark.parametrize("class_name", ["DDIMScheduler", "EulerDiscreteScheduler", "PNDMScheduler"])
def test_read_as_the_pipeline_reads_it(class_name: str, steps_offset: int | None) -> None:
    """StableDiffusionPipeline sets steps_offset to 1 and clip_sample to false in the scheduler that it is given."""
    pipelines = importlib.import_module("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    raw = {key: value for key, value in STABLE_DIFFUSION.items() if key not in ("steps_offset", "clip_sample")}
    raw |= {"_class_name": class_name} | ({} if steps_offset is None else {"steps_offset": steps_offset})
    scheduler = diffusers_class(class_name).from_config(raw)
    pipelines.StableDiffusionPipeline(None, None, None, None, scheduler, None, None, requires_safety_checker=False)
    ours = SchedulerConfig.from_dict(raw)
    assert ours.steps_offset == scheduler.config.steps_offset == 1
    assert not scheduler.config.get("clip_sample")
    switched = diffusers_class("DPMSolverMultistepScheduler").from_config(scheduler.config)
    assert ours.switched(resolve("DPMSolverMultistepScheduler")).steps_offset == switched.config.steps_offset


# ---- what is refused -------------------------------------------------------------------------------------------------

REFUSED: dict[str, object] = {  # option of ACCEPTED → a value that would change the result
    "clip_sample": True,
    "thresholding": True,
    "skip_prk_steps": False,
    "use_beta_sigmas": True,
    "use_lu_lambdas": True,
    "use_flow_sigmas": True,
    "use_dynamic_shifting": True,
    "shift_terminal": 0.1,
    "interpolation_type": "log_linear",
    "timestep_type": "continuous",
    "sigma_min": 0.1,
    "sigma_max": 10.0,
    "lambda_min_clipped": -5.1,
    "variance_type": "learned_range",
    "predict_x0": False,
    "disable_corrector": [0, 1],
    "solver_p": {"_class_name": "DDIMScheduler"},
    "noise_sampler_seed": 7,
}


@pytest.mark.parametrize(("class_name", "key"), [(name, key) for name in FIXED for key in FIXED[name]])
def test_options_that_are_not_computed_are_refused(class_name: str, key: str) -> None:
    raw = {**STABLE_DIFFUSION, "_class_name": class_name}
    with pytest.raises(BundleError, match=f"{class_name}: {key}: got"):
        SchedulerConfig.from_dict({**raw, key: REFUSED[key]})
    for accepted in ACCEPTED[key]:
        SchedulerConfig.from_dict({**raw, key: accepted})
    other = SchedulerConfig.from_dict(
        {**STABLE_DIFFUSION, "_class_name": "EulerAncestralDiscreteScheduler", key: REFUSED[key]}
    )
    with pytest.raises(UsageError, match=key):  # remembered, and refused once it would count
        other.switched(SchedulerChoice(class_name, {}, ""))


@pytest.mark.parametrize(
    ("class_name", "options", "message"),
    [
        ("DDIMScheduler", {"clip_sample": True}, 'set "clip_sample": false'),
        ("PNDMScheduler", {"skip_prk_steps": None}, "ask for plms"),
        ("EulerDiscreteScheduler", {"use_karras_sigmas": True, "use_exponential_sigmas": True}, "one of them"),
        (
            "DPMSolverMultistepScheduler",
            {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
            "wrong constant",
        ),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver"}, "algorithm_type: got dpmsolver, accepted"),
        ("DPMSolverSinglestepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("DPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order: got 4, accepted 1, 2, 3"),
        ("DPMSolverMultistepScheduler", {"solver_order": True}, "solver_order"),
        ("DPMSolverMultistepScheduler", {"solver_type": ["heun"]}, "solver_type"),
        ("UniPCMultistepScheduler", {"lower_order_final": False}, "lower_order_final"),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, "algorithm_type"),
        ("EulerDiscreteScheduler", {"prediction_type": "flow_prediction"}, "prediction_type"),
        ("EulerDiscreteScheduler", {"timestep_spacing": "quadratic"}, "timestep_spacing"),
        ("EulerDiscreteScheduler", {"beta_schedule": "sigmoid"}, "beta_schedule"),
        ("EulerDiscreteScheduler", {"beta_start": "small"}, "beta_start"),
        ("EulerDiscreteScheduler", {"beta_end": -0.1}, "beta_end"),
        ("EulerDiscreteScheduler", {"beta_end": 1.5}, "beta_end"),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1] * 999 + [2.0]}, "trained_betas"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 1}, "num_train_timesteps"),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 1000.0}, "num_train_timesteps"),
        ("EulerDiscreteScheduler", {"trained_betas": [0.1, 0.2]}, "as many as trained_betas"),
        ("LCMScheduler", {"original_inference_steps": 2000}, "original_inference_steps"),
    ],
)
def test_wrong_values_are_refused(class_name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        SchedulerConfig.from_dict({**STABLE_DIFFUSION, "_class_name": class_name, **options})


@pytest.mark.parametrize(
    "raw", [{}, {"_class_name": "FlowMatchEulerDiscreteScheduler"}, {"_class_name": 7}, [], None, "x"]
)
def test_unknown_classes_are_refused(raw: Any) -> None:
    with pytest.raises(BundleError, match="_class_name"):
        SchedulerConfig.from_dict(raw)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
keys = st.sampled_from(sorted({key for options in HONOURED.values() for key in options} | set(ACCEPTED)))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(HONOURED)), st.dictionaries(keys | st.just("_use_default_values"), json_values, max_size=4)
)
def test_any_json_is_read_or_refused(class_name: str, options: dict[str, Any]) -> None:
    """Whatever a file holds: a BundleError that names the class, or a configuration that has a plan."""
    try:
        config = SchedulerConfig.from_dict({**STABLE_DIFFUSION, **options, "_class_name": class_name})
    except BundleError as error:
        assert class_name in str(error)
    else:
        try:
            make_plan(config, 2)
        except (UsageError, BundleError) as error:
            assert any(word in str(error) for word in ("num_inference_steps", "SNR", "steps_offset", "noise schedule"))


@pytest.mark.parametrize("betas", [[1e-9] * 1000, [0.999] * 1000])
def test_a_schedule_without_signal_or_noise_is_refused(betas: list[float]) -> None:
    config = SchedulerConfig.from_dict({**STABLE_DIFFUSION, "trained_betas": betas})
    with pytest.raises(BundleError, match="training noise schedule"):
        make_plan(config, 5)


# ---- names -----------------------------------------------------------------------------------------------------------

KNOWN = {  # what people type → the class, and what of it matters
    "euler_a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "Euler a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "k_euler_a": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "sample_euler_ancestral": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "EulerAncestralDiscreteScheduler": ("EulerAncestralDiscreteScheduler", "Euler a"),
    "Euler": ("EulerDiscreteScheduler", "Euler"),
    "k_euler": ("EulerDiscreteScheduler", "Euler"),
    "euler_karras": ("EulerDiscreteScheduler", "Euler Karras"),
    "LMS Karras": ("LMSDiscreteScheduler", "LMS Karras"),
    "k_lms": ("LMSDiscreteScheduler", "LMS"),
    "Heun": ("HeunDiscreteScheduler", "Heun"),
    "DPM2": ("KDPM2DiscreteScheduler", "DPM2"),
    "dpm_2": ("KDPM2DiscreteScheduler", "DPM2"),
    "DPM2 Karras": ("KDPM2DiscreteScheduler", "DPM2 Karras"),
    "DPM2 a Karras": ("KDPM2AncestralDiscreteScheduler", "DPM2 a Karras"),
    "dpm_2_ancestral": ("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "k_dpm_2_a": ("KDPM2AncestralDiscreteScheduler", "DPM2 a"),
    "DPM++ 2M": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "DPM++ 2M Karras": ("DPMSolverMultistepScheduler", "DPM++ 2M Karras"),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", "DPM++ 2M Karras"),
    "k_dpmpp_2m": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "sample_dpmpp_2m": ("DPMSolverMultistepScheduler", "DPM++ 2M"),
    "DPM++ 2M SDE": ("DPMSolverMultistepScheduler", "DPM++ 2M SDE"),
    "DPM++ 2M SDE Karras": ("DPMSolverMultistepScheduler", "DPM++ 2M SDE Karras"),
    "DPM++ 2M SDE Exponential": ("DPMSolverMultistepScheduler", "DPM++ 2M SDE Exponential"),
    "DPM++ 2M SDE Heun Karras": ("DPMSolverMultistepScheduler", "DPM++ 2M SDE Heun Karras"),
    "dpmpp_2m_sde_gpu": ("DPMSolverMultistepScheduler", "DPM++ 2M SDE"),
    "dpmpp-3m": ("DPMSolverMultistepScheduler", "DPM++ 3M"),
    "DPM++ SDE Karras": ("DPMSolverSDEScheduler", "DPM++ SDE Karras"),
    "dpmpp_sde": ("DPMSolverSDEScheduler", "DPM++ SDE"),
    "dpmpp_2s": ("DPMSolverSinglestepScheduler", "DPM++ 2S"),
    "UniPC": ("UniPCMultistepScheduler", "UniPC"),
    "uni_pc": ("UniPCMultistepScheduler", "UniPC"),
    "uni_pc_bh2": ("UniPCMultistepScheduler", "UniPC"),
    "unipc_bh1": ("UniPCMultistepScheduler", "UniPC bh1"),
    "DEIS": ("DEISMultistepScheduler", "DEIS"),
    "DDIM": ("DDIMScheduler", "DDIM"),
    "ddpm": ("DDPMScheduler", "DDPM"),
    "PLMS": ("PNDMScheduler", "PLMS"),
    "pndm": ("PNDMScheduler", "PLMS"),
    "LCM": ("LCMScheduler", "LCM"),
    "tcd": ("TCDScheduler", "TCD"),
    "DPM++ 2S a": ("dpmpp_2s_ancestral", "DPM++ 2S a"),
    "DPM++ 2S a Karras": ("dpmpp_2s_ancestral", "DPM++ 2S a Karras"),
    "k_dpmpp_2s_a": ("dpmpp_2s_ancestral", "DPM++ 2S a"),
    "sample_dpmpp_2s_ancestral": ("dpmpp_2s_ancestral", "DPM++ 2S a"),
    "er_sde": ("er_sde", "ER SDE"),
    "sample_er_sde": ("er_sde", "ER SDE"),
    "ER SDE Exponential": ("er_sde", "ER SDE Exponential"),
}


@pytest.mark.parametrize("name", KNOWN)
def test_names_people_use(name: str) -> None:
    class_name, label = KNOWN[name]
    for spelling in (name, name.upper(), name.replace("_", "-"), f" {name} "):
        choice = resolve(spelling)
        assert (choice.class_name, choice.label) == (class_name, label)
    config = SchedulerConfig.from_dict(STABLE_DIFFUSION).switched(resolve(name))
    assert config.label == label
    assert config.use_karras_sigmas == ("Karras" in label)
    assert config.use_exponential_sigmas == ("Exponential" in label)
    assert len(make_plan(config, 4)) >= 4


def test_a_name_settles_what_the_file_leaves_open_and_a_class_does_not() -> None:
    karras = SchedulerConfig.from_dict(FILES["saved by DPM++ 2M Karras"])
    assert karras.label == "DPM++ 2M Karras"
    assert not karras.switched(resolve("dpmpp_2m")).use_karras_sigmas
    assert karras.switched(resolve("DPMSolverMultistepScheduler")).use_karras_sigmas
    assert karras.switched(resolve("dpmpp_3m")).solver_order == 3
    assert SchedulerConfig.from_dict({**STABLE_DIFFUSION, "skip_prk_steps": True}).switched(resolve("plms"))


def test_every_spelling_is_its_own() -> None:
    """No two samplers answer to one name."""
    for sampler, preset in PRESETS:
        for spelling in (preset.label, *preset.aliases):
            assert resolve(spelling).label == preset.label
            if sampler.warps:
                assert resolve(f"{spelling} karras").label == f"{preset.label} Karras"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("eular_a", "euler_a"),
        ("dpmpp_3m_sde", "dpmpp_2m_sde"),
        ("DPM++ 2Sa 2", "dpmpp_2s"),
        ("euler_a_karras", "euler_a"),
        ("PNDMSchedular", "PNDMScheduler"),
        ("", "--list-schedulers"),
        ("x" * 100_000, "--list-schedulers"),
    ],
)
def test_unknown_names_show_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(UsageError, match=nearest) as caught:
        resolve(name)
    assert len(str(caught.value)) < 300


def test_describe_lists_all() -> None:
    rows = describe()
    assert len(rows) == len(PRESETS)
    for name, remark in rows:
        assert resolve(name.partition("[")[0]).label == remark.partition(":")[0]


def test_names_and_files_need_no_numpy() -> None:
    code = (
        "import sys; from sd_runtime.sampling import SchedulerConfig, describe, resolve\n"
        "describe(); resolve('euler_a'); sys.exit('numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_read_from_a_file() -> None:
    """DPM-Solver++ configs that diffusers saved hold "lambda_min_clipped": -Infinity."""
    text = importlib.import_module("diffusers").DPMSolverMultistepScheduler().to_json_string().encode()
    assert b"-Infinity" in text
    assert SchedulerConfig.from_bytes(text).class_name == "DPMSolverMultistepScheduler"
    for bad in (b"{", b"[]", b"\xff", b"[" * 100_000):
        with pytest.raises(BundleError, match=r"scheduler_config\.json"):
            SchedulerConfig.from_bytes(bad)
