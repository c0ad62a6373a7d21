"""The only importer of megatron-core: its runtime, model, student and initial weights."""
