//! The commands, one module each.

mod check;
mod convert;
mod delete;
mod gc;
mod images;
mod inspect;
mod layer;
mod remake;
mod repair;
mod verify;

pub use delete::InUse;
pub use repair::WrongResult;

use crate::exit;
use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use std::path::PathBuf;

/// Converts container images to EROFS layers on a shared file system (UFS),
/// from which nodes mount them without downloading them first.
#[derive(Debug, Parser)]
#[command(version, after_help = exit::HELP)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Convert an image: every layer that is not on UFS yet
    Convert(Box<convert::Arguments>),
    /// Check whether registries take the logins that there are for them
    Check(check::Arguments),
    /// Convert a single layer's tar into an EROFS image and its chunk index
    Layer(layer::Arguments),
    /// List the images on UFS
    List(images::Arguments),
    /// Show an image on UFS: its layers, its tree, where a file's bytes lie
    Inspect(inspect::Arguments),
    /// Check every byte of an image on UFS against its roots, and its trees
    Verify(verify::Arguments),
    /// Make layers again whose files on UFS are missing or damaged, from the original
    /// image
    Repair(Box<repair::Arguments>),
    /// Makes one layer for a daemon, which starts this.
    #[command(hide = true)]
    Remake(remake::Arguments),
    /// Delete an image: what no other one needs, and no node uses
    Delete(Box<delete::Arguments>),
    /// Remove unfinished files that no converter works on any more
    Gc(gc::Arguments),
    /// Print a shell's completions for this program
    #[command(
        after_help = "Such as: mkfs-accel completions bash > /etc/bash_completion.d/mkfs-accel"
    )]
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Write the manual pages of this program and its commands into a directory
    Man {
        /// The directory; it must exist
        directory: PathBuf,
    },
}

/// What the program is called.
const NAME: &str = "mkfs-accel";

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
            Command::Check(arguments) => check::run(arguments),
            Command::Layer(arguments) => layer::run(arguments),
            Command::List(arguments) => images::run(arguments),
            Command::Inspect(arguments) => inspect::run(arguments),
            Command::Verify(arguments) => return verify::run(arguments),
            Command::Repair(arguments) => return repair::run(arguments),
            Command::Remake(arguments) => remake::run(arguments),
            Command::Delete(arguments) => delete::run(arguments),
            Command::Gc(arguments) => gc::run(arguments),
            Command::Completions { shell } => {
                let mut script = Vec::new();
                clap_complete::generate(*shell, &mut Self::command(), NAME, &mut script);
                std::io::Write::write_all(&mut std::io::stdout(), &script).map_err(Into::into)
            }
            Command::Man { directory } => clap_mangen::generate_to(Self::command(), directory)
                .with_context(|| format!("cannot write manual pages into {directory:?}")),
        }
        .map(|()| Verdict::Good)
    }
}
