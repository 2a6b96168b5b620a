//! The updatable constants of a context: which there are, how they pair up, and whether a value fits.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use htp_sim::WeightFormat;

use super::SectionError;
use crate::{
    binary::BinaryError,
    graph::{Graph, Node},
    op::OpKind,
    tensor::{Panels, Tensor, TensorId},
    types::{DataType, TensorType},
};

/// The UPDATEABLE_STATIC tensors of all graphs.
#[derive(Debug)]
pub(crate) struct Updatable {
    /// Their names, sorted.
    pub(crate) names: Arc<[String]>,
    /// What each of `names` is.
    declared: Vec<Declared>,
    /// Most rank columns of any pair; 0 without pairs.
    pub(crate) max_rank: usize,
}

/// One updatable tensor as its graph declares it.
#[derive(Debug, Clone, PartialEq)]
struct Declared {
    data_type: DataType,
    dims: Vec<usize>,
    half: Half,
}

/// The place of a tensor in a low-rank pair, with its partner's name.
#[derive(Debug, Clone, PartialEq)]
enum Half {
    /// A `[rank, k]`.
    Down(String),
    /// B `[n, rank]`.
    Up(String),
    /// In no pair: only its own extents fit.
    Alone,
}

impl Updatable {
    /// Collects the tensors of `graphs`.
    ///
    /// # Errors
    /// [`BinaryError::Conflict`] if two graphs declare one name differently.
    pub(crate) fn of(graphs: &[Graph]) -> Result<Updatable, BinaryError> {
        let mut found: BTreeMap<String, (&str, Declared)> = BTreeMap::new();
        for graph in graphs {
            let halves = halves(graph);
            for tensor in graph.tensors().iter().filter(|t| t.tensor_type == TensorType::UpdateableStatic) {
                let half = halves.get(tensor.name.as_str()).cloned().unwrap_or(Half::Alone);
                let declared = Declared { data_type: tensor.data_type, dims: tensor.shape.max_dims(), half };
                match found.get(&tensor.name) {
                    None => _ = found.insert(tensor.name.clone(), (graph.name(), declared)),
                    Some((_, earlier)) if *earlier == declared => {}
                    Some((first, _)) => {
                        let (first, second) = ((*first).to_owned(), graph.name().to_owned());
                        return Err(BinaryError::Conflict { first, second, tensor: tensor.name.clone() });
                    }
                }
            }
        }
        let (names, declared): (Vec<String>, Vec<Declared>) =
            found.into_iter().map(|(name, (_, declared))| (name, declared)).unzip();
        let max_rank = declared.iter().map(Declared::rank).max().unwrap_or(0);
        Ok(Updatable { names: names.into(), declared, max_rank })
    }

    /// Checks that `values` (sorted by name) fit: known names, extents and formats as declared, whole pairs.
    pub(crate) fn check(&self, values: &[(String, Panels)]) -> Result<(), SectionError> {
        let value = |name: &str| {
            let at = values.binary_search_by(|(other, _)| other.as_str().cmp(name)).ok()?;
            Some(&values[at].1)
        };
        values.iter().try_for_each(|(name, panels)| self.check_one(name, panels))?;
        for (name, panels) in values {
            let Some(declared) = self.find(name) else { continue };
            let (Half::Down(partner) | Half::Up(partner)) = &declared.half else { continue };
            let Some(other) = value(partner) else {
                return Err(SectionError::HalfPair { tensor: name.clone(), missing: partner.clone() });
            };
            if let Half::Down(_) = declared.half {
                let (have, want) = (other.layout().k(), panels.layout().n());
                if have != want {
                    return Err(SectionError::PairRank { tensor: partner.clone(), have, partner: name.clone(), want });
                }
            }
        }
        Ok(())
    }

    /// Checks that `panels` fit the tensor called `name`, on their own.
    pub(crate) fn check_one(&self, name: &str, panels: &Panels) -> Result<(), SectionError> {
        match self.find(name) {
            Some(declared) => declared.check(name, panels),
            None => Err(SectionError::UnknownTensor { tensor: name.to_owned() }),
        }
    }

    /// Declared element type of the tensor called `name`.
    pub(crate) fn data_type(&self, name: &str) -> Option<DataType> {
        self.find(name).map(|declared| declared.data_type)
    }

    /// Most rank columns of `values`, which fit.
    pub(crate) fn rank_of(&self, values: &[(String, Panels)]) -> usize {
        let rank = |(name, panels): &(String, Panels)| match self.find(name)?.half {
            Half::Down(_) => Some(panels.layout().n()),
            Half::Up(_) => Some(panels.layout().k()),
            Half::Alone => None,
        };
        values.iter().filter_map(rank).max().unwrap_or(0)
    }

    fn find(&self, name: &str) -> Option<&Declared> {
        let index = self.names.binary_search_by(|n| n.as_str().cmp(name)).ok()?;
        Some(&self.declared[index])
    }
}

impl Declared {
    /// Rank columns, if it is half of a pair.
    fn rank(&self) -> usize {
        match self.half {
            Half::Down(_) => self.dims[0],
            Half::Up(_) => self.dims[1],
            Half::Alone => 0,
        }
    }

    fn check(&self, name: &str, panels: &Panels) -> Result<(), SectionError> {
        let layout = panels.layout();
        let have = [layout.n(), layout.k()];
        let rank_axis = match self.half {
            Half::Down(_) => Some(0),
            Half::Up(_) => Some(1),
            Half::Alone => None,
        };
        let fits = |axis: usize| Some(axis) == rank_axis || self.dims.get(axis) == Some(&have[axis]);
        if self.dims.len() != 2 || !fits(0) || !fits(1) {
            return Err(SectionError::Extents { tensor: name.to_owned(), have, want: self.dims.clone() });
        }
        if let Some(axis) = rank_axis
            && have[axis] > self.dims[axis]
        {
            return Err(SectionError::Rank { tensor: name.to_owned(), have: have[axis], want: self.dims[axis] });
        }
        if data_type_of(layout.format()) != Some(self.data_type) {
            let have =
                data_type_of(layout.format()).map_or_else(|| format!("{:?}", layout.format()), |t| t.to_string());
            return Err(SectionError::DataType { tensor: name.to_owned(), have, want: self.data_type });
        }
        Ok(())
    }
}

/// The element type whose values a section keeps in `format`.
pub(crate) fn data_type_of(format: WeightFormat) -> Option<DataType> {
    match format {
        WeightFormat::F32 => Some(DataType::Float32),
        WeightFormat::F16 => Some(DataType::Float16),
        WeightFormat::Bf16 => Some(DataType::BFloat16),
        WeightFormat::Int8PerChannel => Some(DataType::SFixedPoint8),
        WeightFormat::Int4PerChannel => Some(DataType::SFixedPoint4),
        WeightFormat::Int8Block { .. }
        | WeightFormat::Int6Block { .. }
        | WeightFormat::Int5Block { .. }
        | WeightFormat::Int4Block { .. }
        | WeightFormat::Int4Expansion { .. } => None,
    }
}

/// Both halves of each pair `B (A x)`, with or without the strength in between, by tensor name.
fn halves(graph: &Graph) -> HashMap<&str, Half> {
    let mut writers: HashMap<TensorId, &Node> = HashMap::new();
    for node in graph.nodes() {
        node.outputs.iter().for_each(|id| _ = writers.insert(*id, node));
    }
    let mut halves = HashMap::new();
    for node in graph.nodes() {
        let Some(up) = updatable_weight(graph, node) else { continue };
        let mut before = writers.get(&node.inputs[0]).copied();
        if let Some(scale) = before.filter(|node| node.op == OpKind::ElementWiseMultiply) {
            before = writers.get(&scale.inputs[0]).copied();
        }
        let Some(down) = before.and_then(|node| updatable_weight(graph, node)) else { continue };
        halves.insert(down.name.as_str(), Half::Down(up.name.clone()));
        halves.insert(up.name.as_str(), Half::Up(down.name.clone()));
    }
    halves
}

fn updatable_weight<'a>(graph: &'a Graph, node: &Node) -> Option<&'a Tensor> {
    let weight = graph.tensor(*node.inputs.get(1)?);
    let fits = node.op == OpKind::FullyConnected && weight.tensor_type == TensorType::UpdateableStatic;
    fits.then_some(weight)
}
