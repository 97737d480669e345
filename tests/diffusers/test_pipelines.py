"""Every class of pipelines around a known denoiser runs right under a layout, or is refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from families.classes import call, denoisers, kinds, made, model_name, parts_of
from pipelines import PROMPT, REGIONS, close, diffusers, latents
from torch import Tensor

from dense_attn.examples._tiny_pipeline import tiny_pipeline
from dense_attn.integrations.diffusers import apply_layout, models
from dense_attn.integrations.diffusers.models.sd3 import SD3

pytestmark = pytest.mark.usefixtures("one_thread")

RUNS = """
    AltDiffusion AltDiffusionImg2Img Kolors KolorsImg2Img LatentConsistencyModel
    LatentConsistencyModelImg2Img StableDiffusion StableDiffusionImg2Img StableDiffusionInpaint
    StableDiffusionDepth2Img StableDiffusionLDM3D StableDiffusionAdapter StableDiffusionControlNet
    StableDiffusionControlNetImg2Img StableDiffusionControlNetInpaint StableDiffusionXL
    StableDiffusionXLImg2Img StableDiffusionXLInpaint StableDiffusionXLAdapter
    StableDiffusionXLControlNet StableDiffusionXLControlNetImg2Img
    StableDiffusionXLControlNetInpaint StableDiffusionXLControlNetUnion
    StableDiffusionXLControlNetUnionImg2Img StableDiffusionXLControlNetUnionInpaint
    StableDiffusion3 StableDiffusion3Img2Img StableDiffusion3Inpaint StableDiffusion3ControlNet
    StableDiffusion3ControlNetInpainting Flux FluxImg2Img FluxInpaint FluxFill FluxKontext
    FluxKontextInpaint FluxControl FluxControlImg2Img FluxControlInpaint FluxControlNet
    FluxControlNetImg2Img FluxControlNetInpaint AuraFlow QwenImage QwenImageImg2Img
    QwenImageInpaint QwenImageControlNet QwenImageControlNetInpaint Wan WanImageToVideo
    WanVideoToVideo LucyEdit Flux2Klein Flux2KleinInpaint ZImage ZImageImg2Img ZImageInpaint
    ZImageControlNet ZImageControlNetInpaint Chroma ChromaImg2Img ChromaInpaint
    PixArtAlpha PixArtSigma Lumina2 QwenImageEdit QwenImageEditInpaint QwenImageEditPlus Flux2
    HunyuanDiT HunyuanDiTControlNet CogView4 CogView4Control Sana SanaControlNet SanaSprint
    SanaSprintImg2Img Kandinsky5T2I
    Kandinsky5I2I Kandinsky5T2V Kandinsky5I2V
    LTX LTXImageToVideo HunyuanVideo HunyuanSkyreelsImageToVideo CogVideoX CogVideoXImageToVideo
    CogVideoXVideoToVideo CogVideoXFunControl SkyReelsV2 SkyReelsV2ImageToVideo ChronoEdit
    HunyuanImage HunyuanVideo15 HunyuanVideo15ImageToVideo Flux2KleinKV
"""
REFUSED = {
    r"tell whether it guides \(do_classifier_free_guidance\)": """
        BlipDiffusion BlipDiffusionControlNet CycleDiffusion IF IFImg2Img IFImg2ImgSuperResolution
        IFInpainting IFInpaintingSuperResolution IFSuperResolution StableDiffusionAttendAndExcite
        StableDiffusionDiffEdit StableDiffusionGLIGEN StableDiffusionGLIGENTextImage
        StableDiffusionInpaintPipelineLegacy StableDiffusionLatentUpscale
        StableDiffusionModelEditing StableDiffusionParadigms StableDiffusionPix2PixZero
        StableDiffusionSAG StableDiffusionUpscale StableDiffusionXLInstructPix2Pix StableUnCLIP
        StableUnCLIPImg2Img TextToVideoZero TextToVideoZeroSDXL
    """,
    "have an encode_prompt of a prompt": """
        AudioDiffusion AudioLDM KandinskyCombined KandinskyImg2ImgCombined KandinskyImg2Img
        KandinskyInpaintCombined KandinskyInpaint Kandinsky KandinskyV22Combined
        KandinskyV22ControlnetImg2Img KandinskyV22Controlnet KandinskyV22Img2ImgCombined
        KandinskyV22Img2Img KandinskyV22InpaintCombined KandinskyV22Inpaint KandinskyV22
        LDMTextToImage LEditsPPPipelineStableDiffusion LEditsPPPipelineStableDiffusionXL
        MarigoldDepth MarigoldIntrinsics MarigoldNormals MusicLDM PaintByExample
        SemanticStableDiffusion StableDiffusionImageVariation StableDiffusionInstructPix2Pix
        StableDiffusionPipelineSafe VisualCloze VisualClozeGeneration
    """,
    "make no estimates beside the prompt's and the negative one's": """
        AnimateDiffPAG KolorsPAG StableDiffusion3PAG StableDiffusion3PAGImg2Img
        StableDiffusionControlNetPAG StableDiffusionControlNetPAGInpaint StableDiffusionPAG
        StableDiffusionPAGImg2Img StableDiffusionPAGInpaint StableDiffusionXLControlNetPAG
        StableDiffusionXLControlNetPAGImg2Img StableDiffusionXLPAG StableDiffusionXLPAGImg2Img
        StableDiffusionXLPAGInpaint PixArtSigmaPAG HunyuanDiTPAG
    """,
    "encode its prompt without an image": "HunyuanVideoImageToVideo",
    "make images of one layer": "QwenImageLayered",
    r"call its SanaTransformer2DModel as a Sana\(C.* does": "SanaPAG",
    "call its ZImageTransformer2DModel as a ZImage.* does": "ZImageOmni",
    "call its HunyuanImageTransformer2DModel as a HunyuanImageP": "HunyuanImageRefiner",
    r"call its LTXVideoTransformer3DModel as a LTX\(Image": "LTXCondition LTXI2VLongMultiPrompt",
    r"call its SkyReelsV2Transformer3DModel as a SkyReelsV2\(Image": """
        SkyReelsV2DiffusionForcing SkyReelsV2DiffusionForcingImageToVideo
        SkyReelsV2DiffusionForcingVideoToVideo
    """,
    "denoise the whole image in each call, not views of it": "StableDiffusionPanorama",
    # held as another component, or for several models
    "have a UNet2DConditionModel, .*, got (UnCLIP|Versatile)": """
        UnCLIP UnCLIPImageVariation VersatileDiffusion VersatileDiffusionDualGuided
        VersatileDiffusionImageVariation VersatileDiffusionTextToImage
    """,
    # which the constructor makes out of the U-Net
    "have a UNet2DConditionModel, .* with (UNetMotionModel|UNetControlNetXSModel)": """
        AnimateDiff AnimateDiffControlNet AnimateDiffSDXL AnimateDiffSparseControlNet
        AnimateDiffVideoToVideo AnimateDiffVideoToVideoControlNet PIA StableDiffusionControlNetXS
        StableDiffusionXLControlNetXS
    """,
}

# layers of the image or the text alone, and linear ones
LEFT_ALONE = {"z_image": 2, "lumina2": 2, "sana": 2}
LEFT_ALONE |= {"hunyuan_video": 1, "hunyuan_video15": 1, "hunyuan_image": 1}
LEFT_ALONE |= dict.fromkeys(("kandinsky5", "kandinsky5_i2i", "kandinsky5_t2v"), 1)


def names(listed: str) -> list[str]:
    return [name if "Pipeline" in name else f"{name}Pipeline" for name in listed.split()]


# beside others of their family
RARE = names("""
    QwenImageEditInpaint QwenImageEditPlus HunyuanDiTControlNet CogView4Control SanaControlNet
    SanaSprint Kandinsky5I2I Kandinsky5T2V Kandinsky5I2V HunyuanVideo15ImageToVideo
""")
REASONS = {name: reason for reason, listed in REFUSED.items() for name in names(listed)}


def test_every_class_of_this_diffusers_is_here() -> None:
    """A class that comes with a new one runs, or has its reason; older ones lack some."""
    known = {*names(RUNS), *REASONS}
    assert len(known) == len(names(RUNS)) + len(REASONS)
    assert set(kinds()) - known == set()
    assert len(kinds()) > 80


@pytest.mark.parametrize("name", REASONS)
def test_refused_with_the_reason(name: str) -> None:
    kind = kinds().get(name)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    if " with " in REASONS[name]:
        pipe = made(kind)
    else:  # its other parts are never reached
        pipe = kind.__new__(kind)
        for part in denoisers(kind):
            parts = parts_of(model_name(kind))
            pipe.__dict__[part] = parts.get("transformer", parts.get("unet"))
    with (
        pytest.raises(ValueError, match=f"^pipe must {REASONS[name]}"),
        apply_layout(pipe, PROMPT, REGIONS),
    ):
        pytest.fail("the block must not run")


def rows_of(estimates: Tensor | list[Tensor]) -> Tensor:
    """A call's estimates, the prompt's last; Z-Image has it first, in a list."""
    return torch.stack(estimates[::-1]) if isinstance(estimates, list) else estimates


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.full) if name in RARE else name for name in names(RUNS)],
)
def test_a_run(name: str, calls: list) -> None:
    """The prompt's estimates alone are modulated, in every layer of the first steps.

    The rest is the plain pipeline.
    """
    kind = kinds().get(name)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    pipe, estimates = made(kind), []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_hook(
        lambda _module, _args, out: estimates.append(rows_of(out[0]))
    )
    try:
        call(pipe)
        plain, steps = estimates.copy(), len(estimates)
        estimates.clear()
        with apply_layout(pipe, PROMPT, REGIONS, modulation="range"):
            call(pipe)
    finally:
        handle.remove()
    takes = inspect.signature(kind.__call__).parameters
    apart = "true_cfg_scale" in takes or "num_frames" in takes or "video" in takes
    apart |= name.startswith(("Flux2Klein", "Chroma", "Lumina2", "CogView4", "Kandinsky5"))
    apart |= name.startswith("HunyuanImage")
    apart &= not name.startswith(("LTX", "CogVideoX", "Flux2KleinKV"))
    steps //= 2 if apart else 1
    assert len(estimates) == len(plain)
    assert all(bool(estimate.isfinite().all()) for estimate in estimates)
    layers = sum(hasattr(module, "processor") for module in denoiser.modules())
    layers -= LEFT_ALONE.get(model_name(kind), 0)
    assert len(calls) == -(-3 * steps // 10) * layers
    assert {len(one[0]) for one in calls} == {1}
    if apart:  # the second call of a step is the negative prompt's
        assert not close(estimates[0], plain[0])
        assert torch.equal(estimates[1], plain[1])
    else:
        assert not close(estimates[0][-1:], plain[0][-1:])
        torch.testing.assert_close(estimates[0][:-1], plain[0][:-1], rtol=1e-5, atol=1e-6)
        assert len(estimates[0]) == (
            1
            if "Consistency" in name or "Sprint" in name or model_name(kind).startswith("flux")
            else 2
        )


@pytest.mark.full
@pytest.mark.parametrize(
    "name",
    names("""
        Kolors StableDiffusion3 FluxKontext FluxFill QwenImageEditInpaint CogView4Control
        HunyuanDiTControlNet SanaControlNet Kandinsky5I2V
    """),
)
def test_whole_runs_equal_the_reference(name: str) -> None:
    """Runs of variants; those of the families are in hook/test_families.py."""
    kind = kinds().get(name)
    if kind is None:
        pytest.skip(f"this diffusers has no {name}")
    pipe, estimates = made(kind), []
    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    handle = denoiser.register_forward_hook(lambda _module, _args, out: estimates.append(out[0]))

    def whole(**options: object) -> Tensor:
        estimates.clear()
        with apply_layout(pipe, PROMPT, REGIONS, exponent=0.0, active=1.0, **options):
            call(pipe)
        return torch.stack(estimates)

    try:
        fused, exact = whole(), whole(backend="reference")
        untouched = whole(cross_weight=0, self_weight=0)
        estimates.clear()
        call(pipe)
    finally:
        handle.remove()
    plain = torch.stack(estimates)
    assert close(fused, exact)
    assert not close(fused, plain)
    assert torch.equal(untouched, plain)


def test_a_model_is_one_record(monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    """A new kind of denoiser needs a subclass of Model in the list, and nothing else."""

    class Other(diffusers.SD3Transformer2DModel):
        pass

    pipe = tiny_pipeline(diffusers.StableDiffusion3Pipeline)
    with apply_layout(pipe, PROMPT, REGIONS):
        right = latents(pipe)
    pipe.transformer.__class__ = Other
    of_others = r"have a UNet2DConditionModel, SD3.* or \w+, or one with a record \(.*\)"
    with pytest.raises(ValueError, match=f"^pipe must {of_others}, got .* with Other$"):
        apply_layout(pipe, PROMPT, REGIONS).__enter__()

    class Record(SD3):
        denoiser = "Other"

    monkeypatch.setattr(models, "MODELS", (*models.MODELS, Record))
    with apply_layout(pipe, PROMPT, REGIONS):
        assert torch.equal(latents(pipe), right)


def test_a_model_has_a_file_of_its_own() -> None:
    assert len({model.__module__ for model in models.MODELS}) == len(models.MODELS)
