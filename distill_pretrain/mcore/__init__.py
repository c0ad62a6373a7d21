"""The only importer of megatron-core: model, optimizer, schedule, state, CPU layer."""
