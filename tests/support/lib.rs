//! Shared support of the workspace-wide tests.
