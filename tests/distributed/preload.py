"""What the fork server imports, once for all ranks of all tests; see `harness`."""

# ruff: noqa: F401

from __future__ import annotations

import gc

import deepspeed.module_inject.auto_ep_layer
import deepspeed.ops.triton_ops
import fire
import numpy.ma
import sentencepiece
import tensorboard.compat.proto.summary_pb2
import torch._dynamo
import torch.distributed.checkpoint
import torch.profiler._cupti_monitor
import torch.utils.tensorboard
import webdataset
import yaml
from deepspeed.runtime.superoffload import superoffload_stage3
from deepspeed.runtime.zero import stage3, stage_1_and_2

import models.ared
import models.decllm
import models.entp
import models.redllm
import pipeline.assemble
import pipeline.callbacks.evaluation
import pipeline.callbacks.progress
import pipeline.callbacks.records
import pipeline.callbacks.saving
import pipeline.checkpoint
import pipeline.data.cuts
import pipeline.data.tokenizer
import pipeline.evaluate
import pipeline.finetune
import pipeline.interconnect
import pipeline.optim.build
import pipeline.optim.muon
import pipeline.prefetch
import pipeline.pretrain
import pipeline.rendezvous
import pipeline.trainer
from pipeline.distributed import import_muon_as_written

import_muon_as_written()
# A rank's collections then neither look at all this nor have its pages copied.
gc.collect()
gc.freeze()
