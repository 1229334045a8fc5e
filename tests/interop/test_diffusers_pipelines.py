"""Pipelines of diffusers: opened as flows, straightened, and written back as folders that diffusers samples alike."""

import copy
import json
import shutil
import warnings

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers

from interop.tiny_pipelines import SCALED, change, ddpm, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from pantarhei.files import read_tensors
from pantarhei.flow import Flow, FlowMatching, Term
from pantarhei.flow.couplings import Pairs
from pantarhei.flow.denoising import denoising_steps
from pantarhei.flow.metrics import PseudoHuber
from pantarhei.flow.paths import Linear, Numbered
from pantarhei.flow.pretrained import fingerprint
from pantarhei.interop import load
from pantarhei.interop.diffusers import own_sampler, read, recognise, with_schedule
from pantarhei.interop.diffusers_schedulers import path_of, read_scheduler, scheduler_of
from pantarhei.interop.diffusers_write import write
from pantarhei.networks import MLP, MLPConfig
from pantarhei.networks.diffusers_adapters import add_peft
from pantarhei.recipes.cards import write_card
from pantarhei.recipes.pipelines import CaptionedImages, open_prompts, write_latents
from pantarhei.straighten import LowRank, Solver, make_pairs, phased_task, rectified_diffusion_task
from pantarhei.straighten.convention import check_convention
from pantarhei.straighten.prompt_pairs import PromptPairs, write_prompt_pairs
from pantarhei.straighten.stores import PairSource, check_pairs
from pantarhei.training import FlowTask, train

MAKERS = {"sd": stable_diffusion, "xl": stable_diffusion_xl, "sd3": stable_diffusion_3, "ddpm": ddpm}
QUIET = {"progress": False, "tensorboard": False}


def noise(count, *shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def conditions(flow, prompts):
    return {"tokens": flow.network.tokenize(prompts)} if flow.conditions else None


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return {name: make(root / name) for name, make in MAKERS.items()}


@pytest.mark.parametrize("name", MAKERS)
def test_a_pipeline_is_straightened_and_written_back(folders, tmp_path, name):
    flow = load(folders[name])
    assert isinstance(flow.path, Linear if name == "sd3" else Numbered)
    assert flow.conditions == (() if name == "ddpm" else ("tokens",))
    g, prompts = (1.0 if name == "ddpm" else 2.0), ["a cat", "dog"]
    pictures = flow.sample(x0=noise(2, *flow.shape), condition=conditions(flow, prompts), steps=2, guidance=g)
    assert pictures.shape == ((2, 1, 8, 8) if name == "ddpm" else (2, 3, 16, 16))
    texts = tmp_path / "prompts.txt"
    texts.write_text("a cat\n\ndog\nred  \n")
    source = open_prompts(flow, texts) if flow.conditions else None
    pairs = make_pairs(flow, 8, tmp_path / "pairs", solver=Solver("euler", 2, guidance=g), conditions=source)
    student = flow.like(
        flow.network, rectified=1, teacher="tiny", notes={**flow.provenance.notes, "guidance_in_pairs": g}
    )
    student.codec = None
    terms = (Term(),) if name == "sd3" else (Term("data", PseudoHuber(0.001, elementwise=True)),)
    task = FlowTask(student, FlowMatching(terms=terms, coupling=Pairs()), pairs, average=0.5)
    before = {k: v.clone() for k, v in flow.network.state_dict().items()}
    train(task, tmp_path / "run", iterations=2, batch=4, **QUIET)
    trained = load(tmp_path / "run")
    assert trained.provenance.rectified == 1
    assert (trained.codec is None) == (name == "ddpm")
    assert any(not torch.equal(v, before[k]) for k, v in trained.network.state_dict().items())
    folder = write(trained, tmp_path / "out", guidance=g, steps=4, complete=name != "ddpm")
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **without_t5)
    x0, condition = noise(2, *flow.shape, seed=1), conditions(flow, prompts)
    own = trained.network.own_sample(x0, 4, condition, guidance=g)
    if name == "ddpm":
        made = pipeline(2, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
        assert torch.allclose(torch.from_numpy(made)[..., 0], (own[:, 0] / 2 + 0.5).clamp(0, 1), atol=1e-4)
    else:
        options = {"num_inference_steps": 4, "guidance_scale": g, "output_type": "latent"}
        assert torch.allclose(pipeline(prompts, latents=x0, **options).images, own, rtol=1e-4, atol=1e-4)
    # And our sampler is theirs: at four steps, and at those of the convention check.
    for steps in (4, 50):
        theirs = own_sampler(trained, x0, steps, condition)
        ours = denoising_steps(trained, x0, trained.network.own_times(steps), condition)
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    again = load(folder)
    assert again.provenance.rectified == 1
    assert torch.equal(again.network.own_sample(x0, 2, condition), trained.network.own_sample(x0, 2, condition))
    card = (folder / "README.md").read_text()
    assert all(line in card for line in ("| steps | 4 |", f"| guidance at inference | {g} |", "| teacher | tiny |"))
    assert "set_alpha_to_one False" in card or name == "sd3"
    assert ("creativeml-openrail-m" in card) == (name == "sd")


SCHEDULERS = {
    "DDPMScheduler": SCALED,
    "DDIMScheduler": {"beta_schedule": "linear", "beta_start": 0.00085, "beta_end": 0.012},
    "PNDMScheduler": {"beta_schedule": "squaredcos_cap_v2"},
    "LMSDiscreteScheduler": {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"},
    "EulerDiscreteScheduler": {"trained_betas": [0.01, 0.02, 0.05, 0.4], "num_train_timesteps": 4},
    "DPMSolverMultistepScheduler": {**SCALED, "prediction_type": "sample"},
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedules_are_those_of_the_schedulers(name):
    scheduler = getattr(diffusers, name)(**SCHEDULERS[name])
    settings = read_scheduler({**SCHEDULERS[name], "_class_name": name})
    path, prediction = path_of(settings)
    expected = scheduler.alphas_cumprod.double()
    assert torch.allclose(path.alphas_cumprod(), expected, rtol=2e-5, atol=1e-9)
    t = path.time_of(torch.arange(len(expected)).double())
    assert torch.allclose(path.alpha(t) ** 2, expected, rtol=1e-4, atol=1e-8)
    kinds = {"epsilon": "noise", "v_prediction": "v", "sample": "data"}
    assert prediction.spec()["name"] == kinds[SCHEDULERS[name].get("prediction_type", "epsilon")]
    # What is written for it is the same path again.
    again, kind = path_of(read_scheduler(scheduler_of(path, prediction)))
    assert torch.equal(again.alphas_cumprod(), path.alphas_cumprod())
    assert kind == prediction


def test_a_zero_terminal_snr_is_kept(tmp_path):
    folder = ddpm(
        tmp_path,
        scheduler="DDIMScheduler",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        clip_sample=True,
    )
    flow = load(folder)
    assert float(flow.path.alpha(torch.tensor(0.0))) == 0
    x0 = noise(3, *flow.shape)
    theirs, ours = flow.network.own_sample(x0, 10), denoising_steps(flow, x0, flow.network.own_times(10))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("file", "schedule", "guidance", "rectified", "refused"),
    [
        ("rd.ckpt", "linear", 1.5, 1, False),
        ("cm.ckpt", "linear", 1.0, 1, True),
        ("phased.ckpt", "scaled-linear", 1.5, 1, False),
        ("ema_unet.ckpt", "scaled-linear", None, 0, False),
    ],
)
def test_files_of_rectified_diffusion_get_their_schedule(
    folders, tmp_path, file, schedule, guidance, rectified, refused
):
    weights = read(folders["sd"]).network.model.state_dict()
    torch.save({name: (0.5 * value).half() for name, value in weights.items()}, tmp_path / file)
    unnamed = pytest.warns(UserWarning, match="its name tells no schedule of beta")
    with unnamed if guidance is None else warnings.catch_warnings(action="error"):
        flow = load(tmp_path / file, base=folders["sd"])
    assert flow.path.schedule == schedule
    notes = flow.provenance.notes
    assert (notes.get("guidance"), flow.provenance.rectified) == (guidance, rectified)
    assert (flow.provenance.why_not_field() is not None) == refused
    found = flow.network.model.state_dict()
    assert all(torch.allclose(found[k], 0.5 * v, atol=1e-3) for k, v in weights.items())
    x0, condition = noise(1, 4, 8, 8), conditions(flow, ["a"])
    theirs, ours = (
        flow.network.own_sample(x0, 4, condition),
        denoising_steps(flow, x0, flow.network.own_times(4), condition),
    )
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    card = (write(flow, tmp_path / "out") / "README.md").read_text()
    assert f"beta {schedule.replace('-', '_')} 0.00085..0.012" in card
    if guidance is not None:
        assert f"| guidance at inference | {guidance} |" in card
        assert "| licence of the teacher | creativeml-openrail-m |" in card


def test_a_named_schedule_goes_before_listed_betas_and_needs_no_warning(folders, tmp_path):
    listed = shutil.copytree(folders["sd"], tmp_path / "listed")
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000).square().tolist()
    change(listed / "scheduler" / "scheduler_config.json", trained_betas=betas)
    torch.save(read(listed).network.model.state_dict(), tmp_path / "rd.ckpt")
    flow = load(tmp_path / "rd.ckpt", base=listed)
    assert float(flow.path.alphas_cumprod()[-1]) == pytest.approx(0.001578963, rel=1e-4)
    assert torch.allclose(flow.network._scheduler(4).alphas_cumprod.double(), flow.path.alphas_cumprod(), rtol=1e-4)
    for moved in (with_schedule(read(listed), "linear"), read(listed, schedule="linear")):
        assert moved.path == flow.path
        assert moved.network.config.scheduler == flow.network.config.scheduler
    (tmp_path / "rd.ckpt").rename(tmp_path / "mine.ckpt")
    with warnings.catch_warnings(action="error"):
        assert load(tmp_path / "mine.ckpt", base=listed, schedule="linear").path == flow.path
        load(tmp_path / "mine.ckpt", base=folders["sd"], scheduler=listed / "scheduler")
    with pytest.warns(UserWarning, match=r"mine\.ckpt: its name tells no schedule") as said:
        assert load(tmp_path / "mine.ckpt", base=listed).path.betas is not None
    assert len(said) == 1


def test_what_is_wrong_with_weights_is_named(folders, tmp_path):
    weights = read(folders["sd"]).network.model.state_dict()
    torch.save(weights, tmp_path / "rd.ckpt")
    with pytest.raises(ValueError, match="bare weights need base"):
        load(tmp_path / "rd.ckpt")
    with pytest.raises(ValueError, match=r"not part of the model|has shape|missing"):
        load(tmp_path / "rd.ckpt", base=folders["xl"])
    weights["conv_in.bias"][0] = float("nan")
    torch.save(weights, tmp_path / "rd.ckpt")
    with pytest.raises(ValueError, match=r"conv_in\.bias holds NaN"):
        load(tmp_path / "rd.ckpt", base=folders["sd"])


def test_a_model_folder_needs_its_scheduler_and_takes_its_pipelines_parts(folders, tmp_path):
    assert recognise(folders["sd"] / "unet")
    beside = load(folders["sd"] / "unet")
    assert beside.conditions == ("tokens",)
    assert beside.codec is not None
    shutil.copytree(folders["sd"] / "unet", tmp_path / "unet")
    with pytest.raises(FileNotFoundError, match="give scheduler="):
        load(tmp_path / "unet")
    alone = load(tmp_path / "unet", scheduler=folders["sd"] / "scheduler")
    assert (alone.conditions, alone.codec) == (("text",), None)
    based = load(tmp_path / "unet", scheduler=folders["sd"] / "scheduler", base=folders["sd"], codec=None)
    assert (based.conditions, based.codec) == (("tokens",), None)


def test_an_unfinished_write_goes_back_to_its_pipeline(folders, tmp_path):
    flow = with_schedule(load(folders["sd"]), "linear")
    folder = write(flow, tmp_path / "out")
    assert not (folder / "vae").exists()
    again = load(folder)
    assert again.path == flow.path
    assert again.codec is not None
    model = diffusers.UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder, subfolder="scheduler")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folders["sd"], unet=model, scheduler=scheduler)
    x0 = noise(1, 4, 8, 8)
    own = flow.network.own_sample(x0, 2, conditions(flow, ["a"]))
    made = pipeline("a", latents=x0, num_inference_steps=2, guidance_scale=1.0, output_type="latent").images
    assert torch.allclose(made, own, rtol=1e-4, atol=1e-4)
    assert pipeline.scheduler.config.beta_schedule == "linear"
    change(folder / "pantarhei.json", base=str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match="give base="):
        load(folder)


def test_a_saved_flow_finds_its_autoencoder_as_long_as_the_pipeline_is_there(tmp_path):
    folder = stable_diffusion(tmp_path / "sd")
    flow = load(folder)
    x0, condition = noise(1, 4, 8, 8), conditions(flow, ["a"])
    pictures = flow.sample(x0=x0, condition=condition, steps=1, guidance=2.0)
    flow.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert torch.equal(again.sample(x0=x0, condition=condition, steps=1, guidance=2.0), pictures)
    assert load(tmp_path / "saved", codec=None).codec is None
    shutil.rmtree(folder)
    with pytest.warns(UserWarning, match="samples stay latents"):
        alone = load(tmp_path / "saved")
    text = flow.network._encoders().encode(condition["tokens"], torch.float32).text
    assert alone.network(x0, torch.tensor(0.5), text=text).shape == x0.shape


def test_a_moved_pipeline_is_named_again(tmp_path):
    folder = stable_diffusion(tmp_path / "sd")
    flow = load(folder)
    x0, condition = noise(1, 4, 8, 8), conditions(flow, ["a"])
    pictures = flow.sample(x0=x0, condition=condition, steps=1, guidance=2.0)
    flow.save_pretrained(tmp_path / "saved")
    pairs = make_pairs(flow, 4, tmp_path / "pairs", solver=Solver("euler", 1), conditions=tokens_of(flow))
    student = flow.like(copy.deepcopy(flow.network))
    student.codec = None
    train(FlowTask(student, FlowMatching(coupling=Pairs()), pairs), tmp_path / "run", iterations=1, batch=4, **QUIET)
    ran = load(tmp_path / "run").sample(x0=x0, condition=condition, steps=1, guidance=2.0)
    moved = folder.rename(tmp_path / "moved")
    with pytest.warns(UserWarning, match="give base="):
        lost = load(tmp_path / "saved")
    with pytest.raises(FileNotFoundError, match="give base="):
        lost.network.tokenize(["a"])
    for where, expected in (("saved", pictures), ("run", ran)):
        with warnings.catch_warnings(action="error"):
            again = load(tmp_path / where, base=moved)
        assert torch.equal(again.network.tokenize(["a"]), condition["tokens"])
        assert torch.equal(again.sample(x0=x0, condition=condition, steps=1, guidance=2.0), expected)
        assert again.provenance.notes["pipeline"] == str(moved)
        # Saved from here, it knows its new place.
        again.save_pretrained(tmp_path / f"{where}-again")
        assert load(tmp_path / f"{where}-again").codec is not None
    latents = load(tmp_path / "saved", base=moved, codec=None)
    assert latents.codec is None
    assert torch.equal(latents.network.tokenize(["a"]), condition["tokens"])
    with pytest.raises(FileNotFoundError, match="base: there is no folder"):
        load(tmp_path / "saved", base=tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no folder tokenizer"):
        load(tmp_path / "saved", base=tmp_path)
    with pytest.raises(ValueError, match="other tokens than"):
        load(tmp_path / "saved", base=stable_diffusion_xl(tmp_path / "xl"))
    Flow(MLP(MLPConfig(width=4)), shape=(2,)).save_pretrained(tmp_path / "points")
    with pytest.raises(ValueError, match="base: only a model of diffusers has a pipeline, this is a MLP"):
        load(tmp_path / "points", base=moved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_saved_flow_keeps_its_type_and_is_opened_without_drawing_weights(folders, tmp_path, dtype):
    flow = read(folders["sd"], dtype=dtype)
    flow.save_pretrained(tmp_path / "saved")
    torch.save(flow.network.model.state_dict(), tmp_path / "rd.ckpt")
    state = torch.get_rng_state()
    again = load(tmp_path / "saved")
    bare = read(tmp_path / "rd.ckpt", base=folders["sd"], dtype=dtype)
    assert torch.equal(torch.get_rng_state(), state)
    for found in (again.network, bare.network):
        for name, value in flow.network.state_dict().items():
            assert torch.equal(found.state_dict()[name], value)
            assert found.state_dict()[name].dtype == dtype
        assert all(p.requires_grad for p in found.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_students_of_half_precision_teachers_are_float32(folders, tmp_path, dtype):
    flow = read(folders["sd"], dtype=dtype)
    pairs = make_pairs(flow, 4, tmp_path / "pairs", solver=Solver("euler", 1), conditions=tokens_of(flow))
    images = {"x1": noise(4, 3, 16, 16).clamp(-1, 1), "tokens": flow.network.tokenize(["a", "b", "cd", ""])}
    for number, task in enumerate(
        (
            rectified_diffusion_task(flow, pairs),
            rectified_diffusion_task(flow, pairs, low_rank=LowRank(2)),
            phased_task(flow, images, phases=2, substeps=1, guidance=2.0),
        )
    ):
        networks = (task.flow.network, task.average.network)
        assert {p.dtype for n in networks for p in n.parameters()} == {torch.float32}
        assert task.flow.provenance.notes["teacher_dtype"] == str(dtype).removeprefix("torch.")
        train(task, tmp_path / f"run-{number}", iterations=1, batch=4, **QUIET)  # the phased teacher is asked, in half
        assert load(tmp_path / f"run-{number}").dtype == torch.float32
    assert flow.dtype == dtype
    wide = read(folders["sd"])
    assert "teacher_dtype" not in rectified_diffusion_task(wide, pairs, any_teacher=True).flow.provenance.notes


def test_a_student_on_another_schedule_brings_a_sampler_of_that_schedule(folders, tmp_path):
    flow = load(folders["sd"])
    pairs = make_pairs(flow, 4, tmp_path / "pairs", solver=Solver("euler", 1), conditions=tokens_of(flow))
    student = rectified_diffusion_task(flow, pairs, schedule="linear").result()
    assert student.network.config.scheduler["beta_schedule"] == "linear"
    assert check_convention(student, None).sampler < 1e-5
    assert flow.network.config.scheduler["beta_schedule"] == "scaled_linear"
    assert check_convention(rectified_diffusion_task(flow, pairs).result(), None).sampler < 1e-5


def test_the_empty_prompt_of_sdxl_is_zeros_unless_its_pipeline_says_otherwise(folders, tmp_path):
    folder = shutil.copytree(folders["xl"], tmp_path / "xl")
    for told in (True, False, None):
        index = json.loads((folders["xl"] / "model_index.json").read_text())
        index.pop("force_zeros_for_empty_prompt")
        index |= {} if told is None else {"force_zeros_for_empty_prompt": told}
        (folder / "model_index.json").write_text(json.dumps(index))
        theirs = diffusers.StableDiffusionXLPipeline.from_pretrained(folder).config.force_zeros_for_empty_prompt
        assert load(folder).network.config.zero_null == theirs == (told is not False)
    assert not load(folders["sd"]).network.config.zero_null


def test_cards_of_phased_students_name_steps_and_guidance(folders, tmp_path):
    flow = load(folders["sd"])
    images = {"x1": noise(4, 3, 16, 16).clamp(-1, 1), "tokens": flow.network.tokenize(["a", "b", "cd", ""])}
    task = phased_task(flow, images, phases=4, substeps=1, guidance=3.0)
    result = train(task, tmp_path / "run", iterations=1, batch=4, config={"data": {}}, **QUIET)
    card = (write(task.result(), tmp_path / "out") / "README.md").read_text()
    for line in ("| phases | 4 |", "| steps | 4 |", "| guidance of the teacher | 3.0 |", "num_inference_steps=4"):
        assert line in card
    own = write_card(result.run, result).read_text()
    assert "| phases | 4 |" in own
    assert "--steps 4 " in own
    told = (write(task.result(), tmp_path / "told", steps=2, guidance=0.0) / "README.md").read_text()
    assert all(line in told for line in ("| steps | 2 |", "| guidance at inference | 0.0 |"))


def test_low_rank_students_hold_their_frozen_weights_once(folders, tmp_path):
    flow = load(folders["sd"])
    pairs = make_pairs(flow, 4, tmp_path / "pairs", solver=Solver("euler", 1), conditions=tokens_of(flow))
    task = rectified_diffusion_task(flow, pairs, low_rank=LowRank(2), average=0.5)
    student, average = dict(task.flow.network.named_parameters()), dict(task.average.network.named_parameters())
    for name, parameter in student.items():
        assert (parameter is average[name]) == ("lora_" not in name)
    result = train(task, tmp_path / "run", iterations=2, batch=4, **QUIET)
    (last,) = result.run.checkpoints.glob("*2")
    trained = sum(p.numel() for p in student.values() if p.requires_grad)
    written = sum(value.numel() for value in read_tensors(last / "model.safetensors").values())
    assert written == sum(p.numel() for p in student.values()) + trained
    raw, averaged = load(tmp_path / "run", averaged=False).network, load(tmp_path / "run").network
    for found, expected in ((raw, task.flow.network), (averaged, task.average.network)):
        assert all(torch.equal(found.state_dict()[name], value) for name, value in expected.state_dict().items())
    # What is merged for others leaves the student as it was.
    before = fingerprint(task.flow.network)
    write(task.result(), tmp_path / "out")
    assert fingerprint(task.flow.network) == before


def test_adapters_go_through_a_run_and_are_merged_when_written(folders, tmp_path):
    flow = load(folders["sd"])
    student = flow.like(add_peft(flow.network, rank=2))
    student.codec = None
    pairs = make_pairs(flow, 8, tmp_path / "pairs", solver=Solver("euler", 1), conditions=tokens_of(flow))
    train(FlowTask(student, FlowMatching(coupling=Pairs()), pairs), tmp_path / "run", iterations=2, batch=4, **QUIET)
    trained = load(tmp_path / "run")
    assert trained.network.config.adapter["rank"] == 2
    kept = trained.network.state_dict()[
        "model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.base_layer.weight"
    ]
    plain = flow.network.state_dict()["model.mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"]
    assert torch.equal(kept, plain)
    again = load(write(trained, tmp_path / "out"))
    x0, condition = noise(1, 4, 8, 8), conditions(flow, ["a"])
    assert torch.allclose(
        again.network.own_sample(x0, 2, condition), trained.network.own_sample(x0, 2, condition), atol=1e-3
    )
    assert json.loads((tmp_path / "out" / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def tokens_of(flow):
    return lambda numbers: {"tokens": flow.network.tokenize(["a", "b", "cd", ""])[torch.tensor(numbers) % 4]}


def test_the_autoencoder_is_the_codec(folders):
    for name in ("sd", "sd3"):
        codec = load(folders[name]).codec
        vae = diffusers.AutoencoderKL.from_pretrained(folders[name] / "vae")
        x = noise(3, 3, 16, 16).clamp(-1, 1)
        law = vae.encode(x).latent_dist
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        z = codec.encode(x)
        assert torch.allclose(z, (law.mode() - shift) * scale, atol=1e-6)
        drawn = codec.encode(x, torch.Generator().manual_seed(3))
        assert torch.allclose(drawn, (law.sample(torch.Generator().manual_seed(3)) - shift) * scale, atol=1e-6)
        assert torch.allclose(codec.decode(z), vae.decode(law.mode()).sample.clamp(-1, 1), atol=1e-5)


def test_captioned_pictures_and_their_latents(folders, tmp_path):
    import numpy as np
    from PIL import Image

    flow = load(folders["sd"])
    for i, name in enumerate(("a.png", "b.jpg")):
        Image.fromarray(np.full((20, 30 + i, 3), 255 * i, dtype=np.uint8)).save(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text(f"cat {i}\n")
    source = open_prompts(flow, tmp_path)
    assert isinstance(source, CaptionedImages)
    batch = source.fetch(torch.tensor([1, 0]))
    assert batch["x1"].shape == (2, 3, 16, 16)
    assert torch.allclose(batch["x1"].amax(dim=(1, 2, 3)), torch.tensor([1.0, -1.0]), atol=0.02)
    assert torch.equal(batch["tokens"], flow.network.tokenize(["cat 1", "cat 0"]))
    store = write_latents(flow, source, tmp_path / "latents", batch=1)
    assert torch.allclose(store.tensors()["x1"], flow.encode(source.fetch(torch.tensor([0, 1]))["x1"]), atol=1e-6)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.jpg has no caption b\.txt"):
        open_prompts(flow, tmp_path)
    with pytest.raises(ValueError, match="reads no prompts"):
        open_prompts(load(folders["ddpm"]), tmp_path)
    with pytest.raises(FileNotFoundError, match="no file of prompts"):
        open_prompts(flow, tmp_path / "nothing.txt")


def test_pairs_in_the_published_layout(folders, tmp_path):
    flow = load(folders["sd"])
    prompts = ["a", "b", "cd"]
    x0 = noise(3, 4, 8, 8)
    tokens = flow.network.tokenize(prompts)
    x1 = flow.sample(x0=x0, condition={"tokens": tokens}, steps=10, method="heun", decode=False)
    write_prompt_pairs({"x0": x0, "x1": x1}, prompts, tmp_path / "pairs")
    assert sorted(p.name for p in (tmp_path / "pairs").glob("*00000001*")) == [
        "0_00000001.txt",
        "latent_0_00000001.pth",
        "noise_0_00000001.pth",
    ]
    pairs = PromptPairs(tmp_path / "pairs", flow.network.tokenize, guidance=1.0)
    assert isinstance(pairs, PairSource)
    batch = pairs.fetch(torch.tensor([2, 0]))
    assert torch.allclose(batch["x0"], x0[[2, 0]], atol=5e-3)
    assert torch.equal(batch["tokens"], tokens[[2, 0]])
    check_pairs(pairs, flow)
    with pytest.raises(ValueError, match=r"latent holds NaN or infinity as torch\.float16"):
        write_prompt_pairs({"x0": x0, "x1": 1e6 * x1}, prompts, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    (tmp_path / "pairs" / "noise_0_00000002.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"0_00000002\.txt has no noise_0_00000002\.pth"):
        PromptPairs(tmp_path / "pairs", flow.network.tokenize)


@pytest.mark.parametrize(
    ("file", "settings", "said"),
    [
        ("model_index.json", {"_class_name": "FluxPipeline"}, "unknown pipeline 'FluxPipeline'"),
        ("unet/config.json", {"_class_name": "UNet3DConditionModel"}, "unknown model 'UNet3DConditionModel'"),
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "EDMEulerScheduler"},
            "unknown scheduler 'EDMEulerScheduler'",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}, "unknown beta_schedule 'sigmoid'"),
        ("scheduler/scheduler_config.json", {"prediction_type": "flow_prediction"}, "unknown prediction_type"),
        ("unet/config.json", {"layers_per_block": 2}, "expected shape"),
        ("unet/config.json", {"num_class_embeds": 3}, r"class_embedding\.weight is missing"),
    ],
)
def test_what_is_not_known_is_refused(folders, tmp_path, file, settings, said):
    folder = shutil.copytree(folders["ddpm"], tmp_path / "copy")
    change(folder / file, **settings)
    with pytest.raises(ValueError, match=said):
        load(folder)


def test_missing_and_damaged_weights_are_told_apart(folders, tmp_path):
    folder = shutil.copytree(folders["ddpm"], tmp_path / "copy")
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="unet"):
        load(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no file named"):
        load(folder)


def test_a_flow_that_diffusers_cannot_sample_is_not_written(folders, tmp_path):
    flow = load(folders["ddpm"])
    flow.path = Linear()
    with pytest.raises(ValueError, match="no scheduler for noise on the path linear"):
        write(flow, tmp_path)
