"""The typed recipe: everything ``fit`` can be told."""

from __future__ import annotations

from typing import Literal

import yaml
from pydantic import Field, model_validator

from noisyclean.corpus.decoding import Decode
from noisyclean.recipe.objectives import NcrObjective, ObjectiveRecipe, SremObjective
from noisyclean.recipe.section import Section


class EncoderRecipe(Section):
    """Which dual encoder is trained, and from what weights."""

    name: str = Field("noisyclean-tiny", description="an open_clip model name, or one of noisyclean's own")
    pretrained: str | None = Field(None, description="an open_clip tag or a weights file to start from; null: scratch")
    frozen: bool = Field(
        False,
        description="the towers stay as they are and run once a pair; only a linear map behind each, and the "
        "temperature, are trained",
    )
    image_size: int | None = Field(None, ge=16, description="side of the input picture in pixels; null: the model's")
    context_length: int | None = Field(None, ge=4, description="caption tokens kept; null: the model's")
    decode: Decode = Field(
        "fast",
        description="fast: nearly open_clip's pixels, large JPEGs decoded at a smaller scale; exact: its very pixels; "
        "gpu: as fast, but JPEGs are decoded by the GPU with the model (without one, by the CPU, and slower)",
    )
    temperature: float | None = Field(
        None, gt=0, description="initial softmax temperature; null: that of the pretrained weights, from scratch 0.05"
    )


class DataRecipe(Section):
    """How pairs reach the model."""

    workers: int | None = Field(None, ge=0, description="decoding processes; null: chosen for the machine")
    cache: Literal["auto", "memory", "stream"] = Field(
        "auto", description="hold decoded pictures in memory, or decode them each epoch; auto: memory if they fit"
    )
    holdout: float = Field(0.03, ge=0, lt=0.5, description="share of the pairs that no model trains on, for validation")
    shuffle_buffer: int = Field(8192, ge=1, description="pairs shuffled together while streaming")


class OptimiserRecipe(Section):
    """AdamW with a linear warm-up and a cosine decay to zero."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=2)
    learning_rate: float = Field(1e-3, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1, description="share of all steps over which the learning rate rises")
    gradient_clip: float = Field(1.0, gt=0, description="largest global norm of the gradient")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")
    shift: int = Field(0, ge=0, description="augmentation: each picture moved by up to this many pixels")


class BankRecipe(Section):
    """The reference bank each pair is scored against."""

    size: int = Field(8192, ge=16, description="pairs in the bank of each fold")


class Recipe(Section):
    """Everything ``fit`` can be told. Unknown keys are errors."""

    encoder: EncoderRecipe = EncoderRecipe()
    data: DataRecipe = DataRecipe()
    optimiser: OptimiserRecipe = OptimiserRecipe()
    objective: ObjectiveRecipe = SremObjective()
    bank: BankRecipe = BankRecipe()
    folds: int = Field(
        2,
        ge=1,
        le=16,
        description="cross-fitting folds: each pair is scored by a model that never saw it; 1: one model, which scores "
        "what it has trained on, and a hold-out that tells how much that flatters",
    )
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _frozen_is_of_use(self) -> Recipe:
        encoder, shift = self.encoder, self.optimiser.shift
        if encoder.frozen and encoder.pretrained is None and ":" not in encoder.name:
            raise ValueError(
                f"encoder.frozen is set, but {encoder.name} has no weights that were worth keeping; name some in "
                "encoder.pretrained, or a saved model (local-dir:FOLDER) in encoder.name"
            )
        if encoder.frozen and shift:
            raise ValueError(
                f"optimiser.shift is {shift}, but with encoder.frozen each picture is seen only once; set it to 0"
            )
        return self

    @model_validator(mode="after")
    def _filters_at_all(self) -> Recipe:
        if not isinstance(self.objective, SremObjective | NcrObjective):
            return self
        warmup = self.objective.warmup_epochs
        if warmup >= self.optimiser.epochs:
            raise ValueError(
                f"objective.warmup_epochs is {warmup} and optimiser.epochs {self.optimiser.epochs}: nothing would "
                "ever be filtered; lower the one or raise the other"
            )
        return self

    def to_yaml(self) -> str:
        """The whole recipe, defaults spelt out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
