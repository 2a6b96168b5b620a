//! Where an engine's time goes.

use qnn_core::backend::Account;

/// The account of one graph.
#[derive(Debug, Clone, PartialEq)]
pub struct GraphAccount {
    /// The graph's name.
    pub graph: String,
    /// Its executes and operations.
    pub account: Account,
}
