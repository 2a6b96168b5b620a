//! Which channels can be scaled: found in the graph's structure, whatever the model is called.

use crate::{
    graph::{Graph, Node},
    offline::lora::a_name,
    op::OpKind,
    tensor::{TensorData, TensorId},
    types::TensorType,
};

/// Channels between a source and its readers.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) source: Source,
    pub(super) readers: Vec<Reader>,
    /// What the readers multiply.
    pub(super) input: TensorId,
    /// Where channels may change places: the matrices whose rows go with them, the source among them. Else empty.
    pub(super) partners: Vec<Partner>,
    /// Factors to find.
    pub(super) n_channels: usize,
    /// For attention: query heads of one key and value head, and elements of a head. Their columns share channels.
    heads: Option<(usize, usize)>,
}

/// What the factors are multiplied into.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Source {
    Norm { weight: TensorId },
    Matrix(Partner),
}

/// A matrix whose rows are channels of a group.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Partner {
    pub(super) weight: TensorId,
    pub(super) bias: Option<TensorId>,
    pub(super) module: String,
}

/// A matrix whose columns are divided by the factors.
#[derive(Debug)]
pub(super) struct Reader {
    pub(super) weight: TensorId,
    pub(super) module: String,
}

impl Group {
    /// The channel that column `column` of a reader belongs to.
    pub(super) fn channel(&self, column: usize) -> usize {
        match self.heads {
            None => column,
            Some((queries, head_dim)) => column / (queries * head_dim) * head_dim + column % head_dim,
        }
    }

    /// Columns of a reader.
    pub(super) fn n_columns(&self) -> usize {
        self.heads.map_or(self.n_channels, |(queries, _)| self.n_channels * queries)
    }

    /// The matrix that takes the factors; `None` for a norm.
    pub(super) fn source_matrix(&self) -> Option<&Partner> {
        match &self.source {
            Source::Matrix(matrix) => Some(matrix),
            Source::Norm { .. } => None,
        }
    }

    pub(super) fn source_name(&self, graph: &Graph) -> String {
        match &self.source {
            Source::Norm { weight } => graph.tensor(*weight).name.clone(),
            Source::Matrix(matrix) => matrix.module.clone(),
        }
    }
}

/// All groups of `graph`.
pub(super) fn find(graph: &Graph) -> Vec<Group> {
    let finder = Finder::new(graph);
    graph.nodes().iter().filter_map(|node| finder.group(node)).collect()
}

struct Finder<'g> {
    graph: &'g Graph,
    /// Nodes that read each tensor.
    readers: Vec<Vec<usize>>,
    writers: Vec<Option<usize>>,
}

impl<'g> Finder<'g> {
    fn new(graph: &'g Graph) -> Finder<'g> {
        let mut readers = vec![Vec::new(); graph.tensors().len()];
        let mut writers = vec![None; graph.tensors().len()];
        for (at, node) in graph.nodes().iter().enumerate() {
            node.inputs.iter().for_each(|id| readers[id.index()].push(at));
            node.outputs.iter().for_each(|id| writers[id.index()] = Some(at));
        }
        Finder { graph, readers, writers }
    }

    /// The group whose readers read what `node` computes.
    fn group(&self, node: &Node) -> Option<Group> {
        let mut partners = Vec::new();
        let (source, heads, n_channels) = match node.op {
            OpKind::RmsNorm { .. } => {
                let weight = node.inputs[1];
                let n = self.graph.tensor(weight).shape.last();
                let whole = self.graph.tensor(node.outputs[0]).shape.last() == n;
                (whole && self.is_own(weight)).then_some((Source::Norm { weight }, None, n))?
            }
            OpKind::Attention(attrs) => {
                let heads = Some((attrs.heads / attrs.kv_heads, attrs.head_dim));
                (Source::Matrix(self.matrix(node.inputs[2], 1)?), heads, attrs.kv_heads * attrs.head_dim)
            }
            OpKind::ElementWiseMultiply => {
                let same = |id: &&TensorId| self.graph.tensor(**id).shape == self.graph.tensor(node.outputs[0]).shape;
                let (at, source) = node
                    .inputs
                    .iter()
                    .enumerate()
                    .filter(|(_, id)| same(id))
                    .find_map(|(at, id)| Some((at, self.matrix(*id, 1)?)))?;
                // With the other input computed element by element from a matrix, channels are free to change places.
                let gate = node
                    .inputs
                    .iter()
                    .enumerate()
                    .find(|(other, _)| *other != at)
                    .and_then(|(_, id)| self.activated(*id));
                partners.extend(gate.map(|gate| [source.clone(), gate]).into_iter().flatten());
                (Source::Matrix(source), None, self.graph.tensor(node.outputs[0]).shape.last())
            }
            _ => return None,
        };
        let input = node.outputs[0];
        Some(Group { source, readers: self.readers(input)?, input, partners, n_channels, heads })
    }

    /// The matrices that read `x`, if nothing else reads it but the adapter branches beside them.
    fn readers(&self, x: TensorId) -> Option<Vec<Reader>> {
        self.is_free(x).then_some(())?;
        let (mut readers, mut branches) = (Vec::new(), Vec::new());
        for at in &self.readers[x.index()] {
            let node = &self.graph.nodes()[*at];
            if node.op != OpKind::FullyConnected || node.inputs[0] != x {
                return None;
            }
            let weight = self.graph.tensor(node.inputs[1]);
            if weight.tensor_type == TensorType::UpdateableStatic {
                branches.push(&weight.name);
            } else if self.is_own(node.inputs[1]) && weight.name.strip_suffix(".weight") == Some(&node.name) {
                readers.push(Reader { weight: node.inputs[1], module: node.name.clone() });
            } else {
                return None;
            }
        }
        let known = branches.iter().all(|name| readers.iter().any(|reader| a_name(&reader.module) == **name));
        (known && !readers.is_empty()).then_some(readers)
    }

    /// The matrix whose activation is `x`: `gelu(y)`, or `y · sigmoid(y)`.
    fn activated(&self, x: TensorId) -> Option<Partner> {
        self.is_hidden(x, 1).then_some(())?;
        let node = &self.graph.nodes()[self.writers[x.index()]?];
        match node.op {
            OpKind::Gelu => self.matrix(node.inputs[0], 1),
            OpKind::ElementWiseMultiply => {
                let is_sigmoid_of = |id: TensorId, y: TensorId| {
                    let writer = self.writers[id.index()].map(|at| &self.graph.nodes()[at]);
                    self.is_hidden(id, 1) && writer.is_some_and(|n| n.op == OpKind::Sigmoid && n.inputs[0] == y)
                };
                let (a, b) = (node.inputs[0], node.inputs[1]);
                let y = [(a, b), (b, a)].into_iter().find(|(y, other)| is_sigmoid_of(*other, *y))?.0;
                self.matrix(y, 2)
            }
            _ => None,
        }
    }

    /// The matrix that computes `x`, with its adapter branch if it has one, if it is read in no other place and `x` in
    /// `n_readers`.
    fn matrix(&self, x: TensorId, n_readers: usize) -> Option<Partner> {
        self.is_hidden(x, n_readers).then_some(())?;
        let node = &self.graph.nodes()[self.writers[x.index()]?];
        let node = match node.op {
            OpKind::FullyConnected => node,
            OpKind::ElementWiseAdd => {
                let base = |id: &&TensorId| self.base(**id).is_some();
                let [base_id] = node.inputs.iter().filter(base).collect::<Vec<_>>()[..] else { return None };
                let other = node.inputs.iter().find(|id| *id != base_id)?;
                let up = &self.graph.nodes()[self.writers[other.index()]?];
                let is_branch = up.op == OpKind::FullyConnected && self.is_updateable(up.inputs[1]);
                (is_branch && self.is_hidden(*base_id, 1) && self.is_hidden(*other, 1)).then_some(())?;
                &self.graph.nodes()[self.writers[base_id.index()]?]
            }
            _ => return None,
        };
        let (weight, bias) = (node.inputs[1], node.inputs.get(2).copied());
        let fits = self.is_own(weight) && bias.is_none_or(|bias| self.is_own(bias));
        let named = self.graph.tensor(weight).name.strip_suffix(".weight") == Some(&node.name);
        (fits && named).then(|| Partner { weight, bias, module: node.name.clone() })
    }

    /// The node of a matrix with a weight of its own that writes `id`.
    fn base(&self, id: TensorId) -> Option<&Node> {
        let node = &self.graph.nodes()[self.writers[id.index()]?];
        (node.op == OpKind::FullyConnected && self.is_own(node.inputs[1])).then_some(node)
    }

    /// True for a free intermediate result that so many nodes read.
    fn is_hidden(&self, id: TensorId, n_readers: usize) -> bool {
        self.is_free(id) && self.readers[id.index()].len() == n_readers
    }

    /// True for an intermediate result without static encoding: one that a file brought is for values that are not scaled.
    fn is_free(&self, id: TensorId) -> bool {
        let tensor = self.graph.tensor(id);
        tensor.tensor_type == TensorType::Native && tensor.encoding.is_none()
    }

    fn is_updateable(&self, id: TensorId) -> bool {
        self.graph.tensor(id).tensor_type == TensorType::UpdateableStatic
    }

    /// True for a flat float constant that one node reads.
    fn is_own(&self, id: TensorId) -> bool {
        let tensor = self.graph.tensor(id);
        tensor.tensor_type == TensorType::Static
            && tensor.data_type.is_float()
            && matches!(tensor.data, Some(TensorData::Flat(_)))
            && self.readers[id.index()].len() == 1
    }
}
