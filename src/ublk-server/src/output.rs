//! What commands print.

use anyhow::{Context as _, Result};
use std::fmt::Display;
use std::io::{self, Write as _};

/// Writes `text` to standard output.
///
/// # Errors
/// When nobody reads there, or its disk is full.
pub fn print(text: impl Display) -> Result<()> {
    write!(io::stdout(), "{text}").context("cannot print")
}
