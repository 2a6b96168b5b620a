//! Where the computed tensors of a model are, over all its splits.

use qnn_core::{
    offline::equalize::{ChannelMap, ChannelScales},
    outline::{Place, n_layers, outline},
};

use super::{EngineError, QnnModel};

/// A computed tensor of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct Spot {
    /// Its name.
    pub name: String,
    /// Where it is.
    pub place: Place,
    /// True for the result of its place: what the next one is computed from.
    pub ends: bool,
    /// Elements of a row.
    pub width: usize,
    /// What was done to its channels when the model was equalized or smoothed.
    pub channels: ChannelMap,
}

impl QnnModel {
    /// Most ids of one run.
    pub fn max_rows(&self) -> usize {
        self.ar().last().copied().unwrap_or(0)
    }

    /// Number of layers.
    ///
    /// # Errors
    /// [`EngineError::Outline`] if the model does not say where its layers end.
    pub fn n_layers(&self) -> Result<usize, EngineError> {
        let first = self.graphs().next().and_then(|graphs| graphs.first().copied());
        let untold = || unknown(first.map_or("", |graph| graph.name()));
        first.and_then(n_layers).ok_or_else(untold)
    }

    /// The computed tensors of the model, in the order in which they are computed.
    ///
    /// # Errors
    /// [`EngineError::Outline`] if the model does not say where its layers end.
    pub fn spots(&self) -> Result<Vec<Spot>, EngineError> {
        let mut spots = Vec::new();
        for graphs in self.graphs() {
            // All graphs of a split compute the same tensors.
            let Some(graph) = graphs.first() else { continue };
            let points = outline(graph).ok_or_else(|| unknown(graph.name()))?;
            let scales = ChannelScales::of(graph.metadata())
                .map_err(|why| EngineError::Outline { graph: graph.name().to_owned(), why: why.to_string() })?;
            let mut channels = scales.of_tensors(graph);
            spots.extend(points.into_iter().map(|point| Spot {
                channels: channels.remove(&point.name).unwrap_or_default(),
                name: point.name,
                place: point.place,
                ends: point.ends,
                width: point.width,
            }));
        }
        Ok(spots)
    }
}

fn unknown(graph: &str) -> EngineError {
    EngineError::Outline { graph: graph.to_owned(), why: "it does not say where its layers end".to_owned() }
}
