"""transformers' own common tests on Eso-LMs: modelling, generation, pipelines, training, export, several processes.

The package `tests` is the folder TRANSFORMERS_TESTS (see conftest.py).
"""

import unittest
from contextlib import nullcontext
from fnmatch import fnmatchcase
from unittest import mock

import pytest
import torch
from comparable_models import EsoWithPlainLoss, PlainLossConfig, random_initialization
from exclusions import KNOWN_DEFECTS, NOT_APPLICABLE, is_named, reason_for
from tests.causal_lm_tester import CausalLMModelTest, CausalLMModelTester
from transformers import LlamaConfig
from transformers.models.auto import modeling_auto

from eso_lm import EsoConfig, EsoForMaskedDiffusion, EsoModel
from eso_lm.modeling_eso import EsoPreTrainedModel
from tests import test_fsdp_mixin, test_tensor_parallel_mixin

# The tests look classes up by the names that a model within transformers would have.
modeling_auto.MODEL_MAPPING_NAMES["eso"] = "EsoModel"
modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES["eso"] = "EsoForMaskedDiffusion"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["eso"] = "EsoForMaskedDiffusion"
# Those on several processes are for some model types only; None: for all.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

SPECIAL_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# These give labels without masks.
TRAINING_TESTS = (
    "test_causal_lm_can_accept_training_kwargs",
    "test_fsdp2_*",
    "test_hsdp_*",
    "test_tp_backward",
    "test_training_overfit",
)


class EsoModelTester(CausalLMModelTester):
    base_model_class = EsoModel
    config_class = EsoConfig
    causal_lm_class = EsoForMaskedDiffusion

    mask_token_id = 98
    masked_fraction = 0.0
    config_fields = {}

    def get_config(self) -> EsoConfig:
        fields = {
            "vocab_size": self.vocab_size,
            "mask_token_id": self.mask_token_id,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "intermediate_size": self.intermediate_size,
            "cond_dim": 16,
            "hidden_dropout": 0.0,
            "max_position_embeddings": self.max_position_embeddings,
            "alpha_0": 0.5,
        }
        return self.config_class(**fields | SPECIAL_TOKENS | self.config_fields)

    def prepare_config_and_inputs(self) -> tuple:
        config, input_ids, *others = super().prepare_config_and_inputs()
        input_ids[input_ids == self.mask_token_id] = 3
        input_ids[torch.rand(input_ids.shape) < self.masked_fraction] = self.mask_token_id
        return config, input_ids, *others


class EsoModelTest(CausalLMModelTest, unittest.TestCase):
    """Inputs without masks."""

    model_tester_class = EsoModelTester
    all_model_classes = (EsoModel, EsoForMaskedDiffusion)
    pipeline_model_mapping = {"fill-mask": EsoForMaskedDiffusion, "text-generation": EsoForMaskedDiffusion}
    # For models older than 2023, by the year of copyright in the file of their configuration.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        self.enterContext(random_initialization())
        if any(fnmatchcase(self._testMethodName, test_name) for test_name in TRAINING_TESTS):
            self.model_tester.config_class = PlainLossConfig
            self.model_tester.causal_lm_class = EsoWithPlainLoss
        if reason_for(KNOWN_DEFECTS, type(self).__name__, self._testMethodName) is not None:
            self.subTest = nullcontext  # what fails is to be the test itself

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        if "labels" in inputs and "input_ids" in inputs:
            # A loss without masks is 0.
            inputs["input_ids"] = inputs["input_ids"].clone()
            inputs["input_ids"][:, ::2] = self.model_tester.mask_token_id
            inputs["labels"].fill_(3)
        return inputs

    def prepare_config_and_inputs_for_generate(self, batch_size=2):
        config, inputs = super().prepare_config_and_inputs_for_generate(batch_size)
        if "_export_" in self._testMethodName:
            # Rows that advance alone are packed into forwards that nothing but `generate` can make. These are alike,
            # with a forward for each token.
            inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
            inputs |= {"alpha_0": 0.0, "lockstep": True}
        return config, inputs

    def test_batching_equivalence(self, *args, **kwargs):
        # It takes infinities for errors; the logit of the mask is one.
        compute_logits = EsoForMaskedDiffusion.compute_logits

        def finite_logits(model, hidden_states):
            return compute_logits(model, hidden_states).clamp(min=-100)

        with mock.patch.object(EsoForMaskedDiffusion, "compute_logits", finite_logits):
            super().test_batching_equivalence(*args, **kwargs)

    # These ask for a claim before they try: that `generate` compiles without a break, which it does by the step only.
    @mock.patch.object(EsoPreTrainedModel, "_can_compile_fullgraph", True)
    def test_custom_4d_attention_mask(self):
        super().test_custom_4d_attention_mask()

    @mock.patch.object(EsoPreTrainedModel, "_can_compile_fullgraph", True)
    def test_torch_export_generate_static_static_cache(self):
        super().test_torch_export_generate_static_static_cache()

    @mock.patch.object(EsoPreTrainedModel, "_can_compile_fullgraph", True)
    def test_torch_export_generate_dynamic_static_cache(self):
        super().test_torch_export_generate_dynamic_static_cache()

    # Of an optional sub-config that is not there these would set the angles, too.
    @mock.patch.object(EsoConfig, "sub_configs", {})
    def test_model_rope_scaling_frequencies(self):
        super().test_model_rope_scaling_frequencies()

    @mock.patch.object(EsoConfig, "sub_configs", {})
    def test_model_rope_scaling_from_config_0_linear(self):
        super().test_model_rope_scaling_from_config_0_linear()

    @mock.patch.object(EsoConfig, "sub_configs", {})
    def test_model_rope_scaling_from_config_2_yarn(self):
        super().test_model_rope_scaling_from_config_2_yarn()

    def test_training_overfit(self):
        # It compares with greedy text from left to right.
        self.model_tester.config_fields = self.model_tester.config_fields | {"alpha_0": 0.0}
        super().test_training_overfit()


class EsoMaskedInputTester(EsoModelTester):
    masked_fraction = 0.5


class EsoMaskedInputTest(EsoModelTest):
    """Half of the inputs are masks; and some tests look at the first class only, here the one with a head."""

    model_tester_class = EsoMaskedInputTester
    all_model_classes = (EsoForMaskedDiffusion, EsoModel)


class EsoTiedTester(EsoModelTester):
    config_fields = {"tie_word_embeddings": True}


class EsoTiedTest(EsoModelTest):
    """The head is the embedding."""

    model_tester_class = EsoTiedTester


class EsoLowMaskTester(EsoModelTester):
    mask_token_id = 0
    config_fields = {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}


class EsoLowMaskTest(EsoModelTest):
    """The mask is the first id, so that a smaller vocabulary still has it."""

    model_tester_class = EsoLowMaskTester


class EsoLlamaTester(EsoModelTester):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, num_attention_heads=4, **kwargs)

    def get_config(self) -> EsoConfig:
        llama = LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size,
            max_position_embeddings=self.max_position_embeddings,
            **SPECIAL_TOKENS,
        )
        return self.config_class(**{"backbone_config": llama, "alpha_0": 0.5} | SPECIAL_TOKENS | self.config_fields)


class EsoLlamaTest(EsoModelTest):
    """A Llama in the place of EsoModel."""

    model_tester_class = EsoLlamaTester
    all_model_classes = (EsoForMaskedDiffusion,)
    _is_composite = True


TEST_CLASSES = (EsoModelTest, EsoMaskedInputTest, EsoTiedTest, EsoLowMaskTest, EsoLlamaTest)


@pytest.mark.parametrize("entry", NOT_APPLICABLE + KNOWN_DEFECTS, ids=lambda entry: "::".join(entry[:2]))
def test_each_exclusion_names_a_test(entry):
    names = [(cls.__name__, name) for cls in TEST_CLASSES for name in unittest.defaultTestLoader.getTestCaseNames(cls)]
    assert any(is_named(entry, *name) for name in names)
