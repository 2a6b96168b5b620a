//! How a tool ends. The same in both packages with tools: their libraries have no use for it.

use std::io;
use std::process::ExitCode;

/// The context of an error of standard output.
pub(crate) const STDOUT: &str = "standard output";

/// The exit code of `tool`, which says on standard error why it failed. That nobody reads on, as behind `| head`, is no reason
/// to complain.
pub(crate) fn code(tool: &str, outcome: anyhow::Result<()>) -> ExitCode {
    match outcome {
        Err(error) if !is_closed(&error) => {
            eprintln!("{tool}: {error:#}");
            ExitCode::FAILURE
        }
        _ => ExitCode::SUCCESS,
    }
}

/// Files that are pipes may break, too: that is an error.
fn is_closed(error: &anyhow::Error) -> bool {
    let io = error.root_cause().downcast_ref::<io::Error>();
    error.to_string() == STDOUT && io.is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}
