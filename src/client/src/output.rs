//! What commands print.

use anyhow::{Context as _, Result};
use std::fmt::Display;
use std::io::{self, Write as _};

/// Writes `text` to standard output; nothing if nobody reads there any more.
///
/// # Errors
/// When it cannot be written, its disk being full.
pub fn print(text: impl Display) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result.context("cannot print"),
    }
}
