//! Names of a model's graphs: `prompt_ar128_cl4096_1_of_2`, `token_ar1_cl4096_1_of_2`.

/// What a graph's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct GraphName {
    /// Most tokens of one run.
    pub(super) ar: usize,
    /// Positions that the graph was made for.
    pub(super) cl: usize,
    /// Number of the split, from 1.
    pub(super) split: usize,
    /// Number of splits of the model.
    pub(super) n_splits: usize,
}

impl GraphName {
    /// Reads a name, or gives `None` if it is of another form.
    pub(super) fn parse(name: &str) -> Option<GraphName> {
        let rest = name.strip_prefix("prompt_").or_else(|| name.strip_prefix("token_")).unwrap_or(name);
        let mut parts = rest.split('_');
        let ar = parts.next()?.strip_prefix("ar")?.parse().ok()?;
        let cl = parts.next()?.strip_prefix("cl")?.parse().ok()?;
        let split = parts.next()?.parse().ok()?;
        let of = parts.next()? == "of";
        let n_splits = parts.next()?.parse().ok()?;
        (of && parts.next().is_none() && ar > 0).then_some(GraphName { ar, cl, split, n_splits })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Guards that Genie's graph names are read as they are meant, and others left alone.
    #[test]
    fn reads_genie_names() {
        let check = |name: &str, expected: Option<[usize; 4]>| {
            let found = GraphName::parse(name).map(|g| [g.ar, g.cl, g.split, g.n_splits]);
            assert_eq!(found, expected, "{name}");
        };
        check("prompt_ar128_cl4096_1_of_4", Some([128, 4096, 1, 4]));
        check("token_ar1_cl512_2_of_2", Some([1, 512, 2, 2]));
        check("ar64_cl1024_1_of_1", Some([64, 1024, 1, 1]));
        check("prompt_ar0_cl4096_1_of_4", None);
        check("prompt_ar1_cl4096_1_of_4_x", None);
        check("decoder", None);
    }
}
