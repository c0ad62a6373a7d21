"""The only importer of megatron-core (but for formats): model, optimizer, schedule, state, CPU layer."""
