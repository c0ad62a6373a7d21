"""The model: its recipe sections, layout, layers and forward passes."""
