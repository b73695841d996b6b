"""How a model and its batch are cut over processes: the mesh, plans applied to leaves, sharded flat buffers."""
