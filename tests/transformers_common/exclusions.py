"""Which of transformers' common tests do not apply to an Eso-LM, which are known to fail, and why.

An entry is (class, test, reason): the first two are patterns, as of a shell, for names of `test_common.py`. What
transformers itself skips, for want of a package, a device or a kind of model, is in neither list.
"""

from fnmatch import fnmatchcase

Entry = tuple[str, str, str]

BEAMS = "beams and assistants extend a prefix token by token, from left to right: refused"
OUTPUTS = (
    "looks for scores, attentions and hidden states of each left-to-right step; `EsoGenerateOutput` has scores by slot"
)
POSITIONS = "reads jumps of `position_ids` as borders of packed sequences; here they are the order of generation"
SHRUNK = "cuts off the last ids of the vocabulary, one of which is the mask: EsoLowMaskTest runs it"
ZERO = "makes a special token of 0, which is the mask here"
EMBEDS = "`generate` goes by the tokens of a text, which `inputs_embeds` do not show: refused"
OTHER_HEADS = "for models of classification: it loops over heads that there are none of"
OTHER_MODALITIES = "for models of more than text: it loops over methods that there are none of"
ONCE = "costly, or the same for every class: EsoModelTest runs it"

NOT_APPLICABLE: list[Entry] = [
    ("*", "test_beam_*", BEAMS),
    ("*", "test_generate_from_inputs_embeds_1_beam_search", BEAMS),
    ("*", "test_assisted_decoding_*", BEAMS),
    # Passes without a run: transformers marks these `is_flaky` in a way that drops them.
    ("*", "test_prompt_lookup_decoding_*", BEAMS),
    ("*", "test_greedy_generate_dict_outputs*", OUTPUTS),
    ("*", "test_sample_generate_dict_output", OUTPUTS),
    ("*", "test_generate_compilation_all_outputs", OUTPUTS),
    ("*", "test_tp_generation", OUTPUTS),
    ("*", "test_*_padding_matches_padding_free_with_position_ids*", POSITIONS),
    ("*", "test_generate_from_inputs_embeds_0_greedy", EMBEDS),
    ("*", "test_generate_from_random_inputs_embeds", EMBEDS),
    ("*", "test_generate_with_and_without_position_ids", "`generate` makes the `position_ids` itself"),
    ("*", "test_generate_methods_with_logits_to_keep", "`generate` decides which slots need logits"),
    ("*", "test_causal_lm_loss_honors_shift_labels", "a slot predicts its own token: there is no shift"),
    ("*", "test_model_rope_scaling_from_config_1_dynamic", "angles that change with the length are refused"),
    *[
        (class_name, test_name, SHRUNK)
        for class_name in ("EsoModelTest", "EsoMaskedInputTest", "EsoTiedTest", "EsoLlamaTest")
        for test_name in ("test_resize_tokens_embeddings", "test_resize_embeddings_untied")
    ],
    ("EsoLowMaskTest", "test_model_forward_default_config_values", ZERO),
    ("EsoLowMaskTest", "test_training_overfit", ZERO),
    ("EsoLlamaTest", "test_correct_missing_keys", "`from_causal_lm` loads its base model, a plain Llama"),
    # Nothing of an Eso-LM would be tested.
    ("*", "test_get_*_features_*", OTHER_MODALITIES),
    ("*", "test_can_load_ignoring_mismatched_shapes", OTHER_HEADS),
    ("*", "test_load_with_mismatched_shapes", OTHER_HEADS),
    ("*", "test_problem_types", OTHER_HEADS),
    ("*", "test_generate_from_inputs_embeds", "the empty trunk of parameterized tests"),
    *[
        (class_name, test_name, ONCE)
        for class_name in ("EsoMaskedInputTest", "EsoTiedTest", "EsoLowMaskTest", "EsoLlamaTest")
        for test_name in ("test_fsdp2_*", "test_hsdp_*", "test_pipeline_fill_mask*", "test_pipeline_text_generation*")
    ],
    *[
        (class_name, test_name, ONCE)
        for class_name in ("EsoMaskedInputTest", "EsoTiedTest", "EsoLowMaskTest")
        for test_name in ("test_tp_forward_*", "test_tp_backward", "test_torch_export_*")
    ],
]

# These must fail: once one passes, its entry has to go.
KNOWN_DEFECTS: list[Entry] = []


def reason_for(entries: list[Entry], class_name: str, test_name: str) -> str | None:
    """The reason of the first entry that names the test; None: there is none."""
    return next((entry[2] for entry in entries if is_named(entry, class_name, test_name)), None)


def is_named(entry: Entry, class_name: str, test_name: str) -> bool:
    return fnmatchcase(class_name, entry[0]) and fnmatchcase(test_name, entry[1])
