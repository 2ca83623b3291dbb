//! The commands, one module each.

mod convert;
mod gc;
mod images;
mod layer;
mod verify;

use clap::{Parser, Subcommand};

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed; stderr says what failed and what to do
  2    wrong usage
  3    verify found damage
  130  ended by Ctrl-C, SIGTERM or SIGHUP; unfinished files were removed";

/// Converts container images to EROFS layers on a shared file system (UFS),
/// from which nodes mount them without downloading them first.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image: every layer that is not on UFS yet
    Convert(convert::Arguments),
    /// Convert a single layer's tar into an EROFS image and its chunk index
    Layer(layer::Arguments),
    /// List the images on UFS
    List(images::ListArguments),
    /// Show an image on UFS: its layers, their sizes and roots
    Inspect(images::InspectArguments),
    /// Check every byte of an image on UFS against its roots
    Verify(verify::Arguments),
    /// Remove unfinished files that no converter works on any more
    Gc(gc::Arguments),
}

/// How a command that did not fail turned out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// As wanted.
    Good,
    /// What was checked is damaged.
    Damaged,
}

impl Cli {
    /// Runs the command.
    pub fn run(&self) -> anyhow::Result<Verdict> {
        match &self.command {
            Command::Convert(arguments) => convert::run(arguments),
            Command::Layer(arguments) => layer::run(arguments),
            Command::List(arguments) => images::list(arguments),
            Command::Inspect(arguments) => images::inspect(arguments),
            Command::Verify(arguments) => return verify::run(arguments),
            Command::Gc(arguments) => gc::run(arguments),
        }
        .map(|()| Verdict::Good)
    }
}
