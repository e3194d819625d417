"""text-to-image: train LoRA adapters on the UNet, and text encoders, of Stable Diffusion with images and captions.

The adapter is delivered in the format of diffusers, which GenerateJobs and `load_lora_weights` of pipelines load, and
in that of kohya (`models.lora_files`). The module `diffusion` holds the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from luthier_api.exitcodes import ExitCode
from luthier_api.finetune import FineTuneJobSpec
from luthier_api.run import Compute, FineTuneRun, Weights
from luthier_api.status import Plan
from luthier_api.workspace import WorkspaceFolder
from luthier_trainer.data import columns
from luthier_trainer.data.load import Rows
from luthier_trainer.methods import checks as method_checks
from luthier_trainer.methods.targets import expanded
from luthier_trainer.methods.trainable import adapted_modules, weights_in, with_adapters
from luthier_trainer.models import checks, inspect, lora_files
from luthier_trainer.models.materialize import whole_model
from luthier_trainer.models.sources import Located
from luthier_trainer.runtime.failure import Failure
from luthier_trainer.runtime.notices import notice
from luthier_trainer.tasks import buckets, images
from luthier_trainer.tasks.base import Batch, Collator, LoadedModel, Model, Task, TrainerSetup, TrainingContext
from luthier_trainer.tasks.batches import LabelledBatches, measured_by
from luthier_trainer.tasks.buckets import BUCKET, Size
from luthier_trainer.tasks.images import PIXELS, ROW
from luthier_trainer.workspace.model_files import PIPELINE_CONFIG
from luthier_trainer.workspace.plan import plan_precision

if TYPE_CHECKING:
    import PIL.Image
    import torch
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from luthier_trainer.models.memory import Trial

CAPTION = "caption"  # column of the prepared rows
PRIOR = "prior_"  # how the names of columns begin that hold the image of the class
PRIORS = "spec.dataset.columns.prior"
CAPTIONS = "spec.dataset.columns.text"
SHOWN = 60  # characters of a caption in a message
PREDICTIONS = ("epsilon", "v_prediction")
SIZE_NUMBERS = 6  # numbers that describe size and crop of an image; refiners have five


class TextToImage(LabelledBatches, Task):
    """The task text-to-image."""

    def columns(self, spec: FineTuneJobSpec) -> tuple[str, ...]:
        prior = spec.dataset.columns.prior
        return (spec.dataset.columns.image, spec.dataset.columns.text, *([prior] if prior else []))

    def fitting(self, rows: Rows, spec: FineTuneJobSpec) -> Rows:
        """Return the rows with their images and captions. Raises Failure if one is missing or cannot be read."""
        found = columns.texts(images.fitting(rows, spec), spec.dataset.columns.text, CAPTIONS, drop_blank=False)
        if spec.dataset.columns.prior is not None:
            priors_of(found, spec)
        return found

    def read_model(self, located: Located, run: FineTuneRun, folder: WorkspaceFolder, rows: Rows) -> Model:
        from luthier_trainer.models import pipelines

        path = whole_model(located, run, folder, run.spec.model.job, "model")
        checks.check_pipeline(path, located.field)
        unet = pipelines.skeletons(path, pipelines.index_of(path, located.field), located.field)["unet"]
        return Model(located.resolved, path, unet.config, processor=None)

    def check_model(self, model: Model, spec: FineTuneJobSpec, rows: int, labels: list[str] | None) -> None:
        models = check_pipeline(model.path, spec, inspect.MODEL)
        check_targets(models, spec, "spec.method.targetModules")

    def encode(self, rows: Rows, processor: None, spec: FineTuneJobSpec, labels: list[str] | None, use: str) -> Dataset:
        """Return the columns `pixel_values` (still encoded files), `caption` and `labels` (the number of the row).

        With prior preservation, training rows also have `prior_pixel_values` and `prior_caption`. With
        `image.bucketStep` a row has the height and width of its images, `bucket`.
        """
        from datasets import Features, Image, List, Value

        names = {spec.dataset.columns.image: PIXELS, spec.dataset.columns.text: CAPTION}
        data = rows.data.select_columns(list(names)).rename_columns({a: b for a, b in names.items() if a != b})
        features = {PIXELS: Image(), CAPTION: Value("large_string")}
        if spec.dataset.columns.prior is not None and use == "training":
            data = paired(data, priors_of(rows, spec))
            features |= {PRIOR + name: feature for name, feature in features.items()}
        data = data.add_column(ROW, list(range(len(data))))
        features |= {ROW: Value("int64")}
        if spec.image.bucket_step is not None:
            data = buckets.with_buckets(
                data, [name for name in (PIXELS, PRIOR + PIXELS) if name in features], spec, use
            )
            features |= {BUCKET: List(Value("int64"))}
        return data.cast(Features(features))

    def groups(self, data: Dataset) -> list[int] | None:
        """Return a number for each row that stands for the size of its images; None if all are of one."""
        return buckets.numbered(data[BUCKET][:]) if BUCKET in data.column_names else None

    def contents(self, rows: Rows, spec: FineTuneJobSpec) -> Iterator[Sequence[str | bytes]]:
        return images.contents(rows, spec)

    def check_encoded(self, data: DatasetDict, model: Model, labels: list[str] | None) -> None:
        """Give notice, for each split, of captions that are longer than the text encoders read."""
        for use, rows in data.items():
            report_unread(rows, read_tokenizers(model.path), use)

    def kept_bytes(self, model: Model, spec: FineTuneJobSpec, data: DatasetDict) -> int:
        """Return what the encodings of all rows take, if they are kept."""
        if not spec.image.cache_encodings:
            return 0
        from luthier_trainer.models import pipelines
        from luthier_trainer.tasks.kept_encodings import bytes_of

        found = pipelines.skeletons(model.path, pipelines.index_of(model.path, inspect.MODEL), inspect.MODEL)
        computed_bytes = 4 if plan_precision(spec.training.precision, spec.resources.gpus_per_node) == "fp32" else 2
        held_out = [split for name, split in data.items() if name != "train"]
        sizes = [size for split in held_out for size in buckets.of_rows(split, spec)]
        own = bytes_of(found, sizes, 1, computed_bytes)
        return own + bytes_of(found, buckets.of_rows(data["train"], spec), images_of_a_row(spec), computed_bytes)

    def cannot_recompute(self, model: Model, spec: FineTuneJobSpec) -> str | None:
        return None

    def weights(self, model: Model, spec: FineTuneJobSpec, plan: Plan, labels: list[str] | None) -> Weights:
        from luthier_trainer.models import pipelines
        from luthier_trainer.tasks.diffusion import learning_part

        found = pipelines.skeletons(model.path, pipelines.index_of(model.path, inspect.MODEL), inspect.MODEL)
        weights = weights_in(learning_part(found, spec), [], spec, plan, source="float32")
        return weights.model_copy(update={"result_files": lora_files.FILES})

    def compute(
        self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None
    ) -> Compute | None:
        """Return the multiply-adds of one image: of what gets adapters, and of the models that are frozen.

        Of several sizes, the one counts that has about as many pixels as they have on average.
        """
        from luthier_trainer.models import pipelines
        from luthier_trainer.tasks.diffusion import learning_part, macs_of

        found = pipelines.skeletons(model.path, pipelines.index_of(model.path, inspect.MODEL), inspect.MODEL)
        size = buckets.average(rows, spec)
        return with_adapters(macs_of(found, spec, size), learning_part(found, spec), [], spec)

    def trial(self, model: Model, spec: FineTuneJobSpec, labels: list[str] | None, rows: Dataset | None) -> Trial | str:
        from luthier_trainer.models import pipelines
        from luthier_trainer.tasks.diffusion_step import of_images

        index = pipelines.index_of(model.path, inspect.MODEL)
        found = pipelines.skeletons(model.path, index, inspect.MODEL)
        schedule = pipelines.read_scheduler(model.path, index, inspect.MODEL).config
        return of_images(found, schedule, spec, buckets.largest(rows, spec))

    def computed_tokens(self, batch: Batch) -> None:
        """Return None: captions are filled up to the length of the encoder, and no token of them is learnt."""
        return

    def read_processor(self, folder: Path, field: str) -> None:
        """Return None, because the tokenizers are read from the folder of the pipeline."""
        return

    def loader_workers(self, cores: int) -> int:
        return images.loader_workers(cores)

    def arguments(self, spec: FineTuneJobSpec, common: Mapping[str, Any]) -> TrainingArguments:
        # transformers would drop the columns that are not arguments of the UNet's `forward`.
        common = {**common, "remove_unused_columns": False}
        if spec.image.bucket_step is not None:
            common["per_device_eval_batch_size"] = 1  # held-out images come in their own order, of all sizes
        return super().arguments(spec, common)

    def load_model(self, context: TrainingContext) -> LoadedModel:
        from luthier_trainer.tasks.diffusion import load_learning

        return LoadedModel(load_learning(context.model_path, context.spec, context.weights["dtype"], inspect.MODEL))

    def trainer(self, context: TrainingContext, model: Any) -> TrainerSetup:
        from luthier_trainer.tasks.diffusion import DiffusionTrainer, RowLosses, load_frozen

        frozen = load_frozen(context.model_path, context.spec, context.weights["dtype"], inspect.MODEL)
        image = context.spec.image
        options = {
            "frozen": frozen,
            "min_snr_gamma": image.min_snr_gamma,
            "prior_weight": image.prior_loss_weight or 1.0,
            "kept_in": context.folder / "encodings" if image.cache_encodings else None,
            **measured_by(RowLosses()),
        }
        make_batch = collator(read_tokenizers(context.model_path), context.spec.image.resolution)
        return TrainerSetup(DiffusionTrainer, make_batch, options)

    def complete_result(self, folder: Path, model: Any, context: TrainingContext) -> None:
        """Convert the adapter that PEFT has saved in `folder` to the formats of diffusers and of kohya."""
        from luthier_trainer.tasks.diffusion import ReadingUNet

        base = model.get_base_model()
        reading = isinstance(base, ReadingUNet)
        kind = json.loads((context.model_path / PIPELINE_CONFIG).read_text())["_class_name"]
        lora_files.convert(
            folder, model.peft_config["default"].to_dict(), base.unet if reading else base, kind, by_part=reading
        )


def check_pipeline(path: Path, spec: FineTuneJobSpec, field: str) -> dict[str, Any]:
    """Check the pipeline in `path`, and return its models without weights.

    Raises Failure if the pipeline does not suit the spec.
    """
    from luthier_trainer.models import pipelines

    index = pipelines.index_of(path, field)
    models = pipelines.skeletons(path, index, field)
    needed = pipelines.MODELS if index["_class_name"] in checks.XL else pipelines.MODELS[:-1]
    if lacking := [name for name in needed if name not in models]:
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: the pipeline has no {lacking[0]}; choose a base model of Stable Diffusion, not a refiner",
        )
    for name, model in models.items():
        pipelines.check_weights(path / name, model, field)
    pipelines.read_tokenizers(path, index, field)
    check_schedule(pipelines.read_scheduler(path, index, field).config, field)
    unit = pipelines.pixels_of_a_latent(models["vae"])
    side = spec.image.resolution
    for name, pixels in (("resolution", side), ("bucketStep", spec.image.bucket_step)):
        if pixels and pixels % unit:
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"spec.image.{name}: {pixels} is not a multiple of {unit}, as this model wants; set"
                f" {pixels // unit * unit or unit} or {(pixels // unit + 1) * unit}",
            )
    check_conditioning(models, side // unit, field)
    return models


def check_targets(models: Mapping[str, Any], spec: FineTuneJobSpec, field: str) -> None:
    """Check that the job's targets name modules of the UNet and, if they learn, of each text encoder.

    `models`: of a pipeline. Raises Failure if a target names no module, or if a text encoder would not learn.
    """
    import torch

    from luthier_trainer.tasks.diffusion import encoders_of, learning_part

    model = learning_part(models, spec)
    method = expanded(spec.method, model, [])
    kind = "the UNet with its text encoders" if spec.image.train_text_encoders else "the UNet"
    method_checks.check_modules(model, kind, [], method.target_modules, field)
    if not spec.image.train_text_encoders:
        return
    names = adapted_modules(model, method, [])
    if table := next((name for name in names if isinstance(model.get_submodule(name), torch.nn.Embedding)), None):
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: {table} is an embedding, and diffusers loads adapters of linear modules alone; leave it out",
        )
    for part in ("unet", *encoders_of(models)):
        if not any(name.startswith(f"{part}.") for name in names):
            some = "to_q, to_k, to_v and to_out.0" if part == "unet" else "q_proj, k_proj, v_proj and out_proj"
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: none of them is in the {part}, which would not learn; add {some}, or set"
                " image.trainTextEncoders: false",
            )


def check_schedule(config: Mapping[str, Any], field: str) -> None:
    """Check that the model was trained with noise that this task can reproduce. Raises Failure if not."""
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or "beta_start" not in config:
        found = f"{config.get('_class_name')}, prediction_type {prediction}"
        raise Failure(
            ExitCode.INVALID_SPEC,
            f"{field}: its scheduler ({found}) adds noise in another way than Stable Diffusion does, which cannot be"
            f" trained here; choose a model with betas and a prediction_type of {' or '.join(PREDICTIONS)}",
        )


def check_conditioning(models: Mapping[str, Any], side: int, field: str) -> None:
    """Check that the UNet accepts the outputs of the VAE and the text encoders. Raises Failure if not.

    `side`: height and width of the latents. The UNet runs on the meta device, which allocates no memory.
    """
    import torch

    from luthier_trainer.tasks.diffusion import encoders_of

    configs = [encoder.config for encoder in encoders_of(models).values()]
    with torch.device("meta"):
        sample = torch.empty(1, models["vae"].config.latent_channels, side, side)
        hidden = torch.empty(1, configs[0].max_position_embeddings, sum(config.hidden_size for config in configs))
        conditions = {}
        if len(configs) > 1:
            pooled = torch.empty(1, configs[1].projection_dim)
            conditions["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": torch.empty(1, SIZE_NUMBERS)}
        try:
            models["unet"](sample, torch.empty(1), hidden, **conditions)
        except Exception as error:  # the blocks of a UNet check their inputs with many types of exceptions
            text = " ".join(str(error).split())[:300]
            raise Failure(
                ExitCode.INVALID_SPEC,
                f"{field}: its UNet does not take what its VAE and its text encoders make: {text}. Choose a base model"
                " of Stable Diffusion, not a refiner, and none for inpainting",
            ) from error


def report_unread(rows: Dataset, tokenizers: list[PreTrainedTokenizerBase], use: str) -> None:
    """Give notice of captions that are longer than the text encoders read. `use`: the split of the rows."""
    from luthier_trainer.models import pipelines

    captions = [caption for name in (CAPTION, PRIOR + CAPTION) if name in rows.column_names for caption in rows[name]]
    counts = [pipelines.unread_tokens(tokenizers, caption) for caption in captions]
    if most := max(counts):
        limit = min(tokenizer.model_max_length for tokenizer in tokenizers)
        notice(
            f"{CAPTIONS}: {sum(count > 0 for count in counts)} of the {len(counts)} captions of split {use} are longer"
            f" than the {limit} tokens that the text encoders read, and their ends are not learnt: up to {most} tokens,"
            f' of "{captions[counts.index(most)][:SHOWN]} ...". Shorten them'
        )


def images_of_a_row(spec: FineTuneJobSpec) -> int:
    """Return how many images a row of the training has: two with prior preservation."""
    return 1 if spec.dataset.columns.prior is None else 2


def priors_of(rows: Rows, spec: FineTuneJobSpec) -> list[bool]:
    """Return whether each row shows the class instead of what is to be learnt.

    Raises Failure if the column is missing, or if a cell is neither true nor false.
    """
    name = str(spec.dataset.columns.prior)
    columns.require(rows, name, PRIORS, taken=[spec.dataset.columns.image, spec.dataset.columns.text])
    cells = [str(cell).strip().lower() for cell in rows.data[name]]
    if unclear := [i for i, cell in enumerate(cells) if cell not in columns.BOOLEANS]:
        raise columns.invalid(
            f'{PRIORS}: column "{name}" of {rows.origin} is neither true nor false in {len(unclear)} of'
            f" {len(cells)} rows. The first is {rows.place(unclear[0])}: {cells[unclear[0]]}. Write true for images of"
            " the class, and false for those to learn"
        )
    return [columns.BOOLEANS[cell] for cell in cells]


def paired(data: Dataset, priors: Sequence[bool]) -> Dataset:
    """Return pairs of an image to learn and one of the class, as diffusers' script of DreamBooth makes them.

    An epoch has each image at least once: the fewer ones begin again from the first. `priors`: of `priors_of`. Raises
    Failure if there are no images of a kind.
    """
    from datasets import concatenate_datasets

    own = [i for i, prior in enumerate(priors) if not prior]
    others = [i for i, prior in enumerate(priors) if prior]
    if not own or not others:
        lacking = "true, so that nothing is to be learnt" if not own else "false, so that no class is preserved"
        raise columns.invalid(
            f"{PRIORS}: is {lacking}, in all {len(priors)} training rows; mark some of them otherwise"
        )
    pairs = max(len(own), len(others))
    notice(
        f"{PRIORS}: {len(own)} images are learnt beside {len(others)} of the class: {pairs} rows in an epoch, each with"
        " one of both"
    )
    learnt = data.select([own[i % len(own)] for i in range(pairs)])
    of_class = data.select([others[i % len(others)] for i in range(pairs)])
    of_class = of_class.rename_columns({name: PRIOR + name for name in data.column_names})
    return concatenate_datasets([learnt, of_class], axis=1)


def read_tokenizers(path: Path) -> list[PreTrainedTokenizerBase]:
    """Return the tokenizers of the pipeline in `path`, one for each text encoder. Raises Failure if one is missing."""
    from luthier_trainer.models import pipelines

    return pipelines.read_tokenizers(path, pipelines.index_of(path, inspect.MODEL), inspect.MODEL)


@dataclass(frozen=True)
class Framed:
    """A crop of an image, and its position in the image."""

    image: PIL.Image.Image
    time_ids: tuple[int, ...]
    """SDXL's inputs besides the caption: original height and width, top and left of the crop, its height and width."""


def framed(image: PIL.Image.Image, size: Size) -> Framed:
    """Return the centre crop of an image, scaled so that it covers `size` and no more."""
    import PIL.Image
    import PIL.ImageOps

    width, height = image.size
    scale = max(size.height / height, size.width / width)
    top, left = round((height * scale - size.height) / 2), round((width * scale - size.width) / 2)
    crop = PIL.ImageOps.fit(image.convert("RGB"), (size.width, size.height), PIL.Image.Resampling.LANCZOS)
    return Framed(crop, (height, width, top, left, size.height, size.width))


def pixels_of(image: PIL.Image.Image) -> torch.Tensor:
    """Return an RGB image as fp32 [3, height, width] with values from -1 to 1."""
    import torch

    values = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)
    return values.permute(2, 0, 1).float() / 127.5 - 1


def token_ids(tokenizer: PreTrainedTokenizerBase, captions: list[str]) -> torch.Tensor:
    """Return token ids, int64 [rows, positions of the text encoder]. Captions that are too long are cut."""
    ids: torch.Tensor = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    return ids


def collator(tokenizers: list[PreTrainedTokenizerBase], resolution: int) -> Collator:
    """Return a function that makes batches of images: squares with `resolution` pixels a side, or of the size that all
    rows of a batch have (`image.bucketStep`).
    """
    import torch

    def collate(rows: list[dict[str, Any]]) -> Batch:
        """Return a batch of `DiffusionTrainer`. The dataset decodes the images of `rows` when it reads them.

        Repetitions of a row, with which `training.order.InGroups` fills up batches, are left out.
        """
        size = Size(resolution, resolution)
        if BUCKET in rows[0]:
            rows = list({row[ROW]: row for row in rows}.values())
            size = Size(*rows[0][BUCKET])
        prefixes = ("", PRIOR) if PRIOR + PIXELS in rows[0] else ("",)
        frames = [framed(row[prefix + PIXELS], size) for prefix in prefixes for row in rows]
        captions = [row[prefix + CAPTION] for prefix in prefixes for row in rows]
        batch = {
            PIXELS: torch.stack([pixels_of(frame.image) for frame in frames]),
            "input_ids": token_ids(tokenizers[0], captions),
            ROW: torch.tensor([row[ROW] for row in rows]),
        }
        if len(tokenizers) > 1:
            batch["input_ids_2"] = token_ids(tokenizers[1], captions)
            batch["time_ids"] = torch.tensor([frame.time_ids for frame in frames], dtype=torch.float32)
        return batch

    return collate
