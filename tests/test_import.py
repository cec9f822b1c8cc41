"""The import command: what becomes of a Hugging Face folder, what is refused, and what hostile folders can do."""

import dataclasses
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from conftest import ROOT
from test_huggingface import GLM, QWEN, make, our_logits, their_logits

from qatmoe import export, import_hf, metrics, train
from qatmoe.checkpoint import Checkpoints
from qatmoe.config import ModelConfig
from qatmoe.convert import hf_config, huggingface_model
from qatmoe.convert.hf_import import import_folder
from qatmoe.convert.weights import Branch
from qatmoe.data import batches, corpus, tokenizer
from qatmoe.errors import UserError

TINY = QWEN | dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1, head_dim=4,
                   num_experts=2, num_experts_per_tok=1, moe_intermediate_size=4, vocab_size=300)  # fmt: skip
INDEX = "model.safetensors.index.json"


def arrays_of(run):
    """Every array of a run's checkpoint and its type, as saved."""
    with Checkpoints(run, "trunk") as checkpoints:
        meta = checkpoints.meta(0)
        wanted = {n: checkpoints_shape(what) for n, what in meta["tensors"].items()}
        return {n: np.asarray(a) for n, a in checkpoints.arrays(meta, wanted).items()}


def checkpoints_shape(what):
    return transformers_free_struct(tuple(what[1]), what[0])


def transformers_free_struct(shape, dtype):
    import jax

    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
