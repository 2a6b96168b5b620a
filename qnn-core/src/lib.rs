//! Tensors, graphs, contexts, context binaries and the offline tools.
