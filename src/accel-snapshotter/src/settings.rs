//! What `serve` can be told, on the command line or in a file; the former counts.
//!
//! The file is TOML and has the options by their names, `_` for `-`.

use crate::serve::Options;
use crate::snapshotter::Choices;
use accel_client::paths::{Paths, SOCKET};
use anyhow::{Context, Result};
use serde::Deserialize;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where containerd 1.6 looks for disk figures of a snapshotter called `accel`.
pub const ROOT: &str = "/var/lib/containerd/io.containerd.snapshotter.v1.accel";
/// Where containerd asks.
pub const LISTEN: &str = "/run/accel/snapshotter.sock";
/// Seconds that a pull may spend on lazy layers.
const BUDGET: f64 = 5.0;

/// Who mounts layers for containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mounts {
    /// The snapshotter; containerd mounts an overlay over them. For every version
    Overlay,
    /// containerd 2.2 or later mounts layers' devices itself, once more
    Native,
}

/// Options; those that are missing are elsewhere or have their defaults.
#[derive(Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// Where snapshots are kept [default: where containerd 1.6 looks for its disk figures]
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,
    /// Where containerd asks [default: /run/accel/snapshotter.sock]
    #[arg(long, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// The admin socket of ublk-server [default: as ublk-server has it]
    #[arg(long, value_name = "PATH")]
    pub server: Option<PathBuf>,
    /// Its run directory, if it was told another than the default
    #[arg(long, value_name = "DIR")]
    pub server_run_dir: Option<PathBuf>,
    /// The UFS that layers have to come from, as ublk-server has been told it: if that reads
    /// another one, this does not start, or later unpacks all layers [default: any]
    #[arg(long, value_name = "DIR")]
    pub ufs: Option<PathBuf>,
    /// Seconds that a pull may spend on finding and mounting layers; what is not
    /// there by then is downloaded and unpacked [default: 5]
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    pub budget: Option<f64>,
    /// Who mounts layers for containers [default: overlay]
    #[arg(long, value_enum)]
    pub mounts: Option<Mounts>,
    /// Load images lazily that were converted but are not accelerated ones, too: their
    /// layers are what UFS says. Whoever can write there then decides what runs
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub trust_ufs: Option<bool>,
}

fn seconds(text: &str) -> Result<f64, String> {
    let number = text.parse().map_err(|_| "this is no number".to_owned())?;
    in_range(number).map_err(str::to_owned)
}

fn in_range(seconds: f64) -> Result<f64, &'static str> {
    match (0.1..=600.0).contains(&seconds) {
        true => Ok(seconds),
        false => Err("at least 0.1 and at most 600"),
    }
}

impl Settings {
    /// What a file says.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("{} is wrong", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let settings: Self = toml::from_str(text)?;
        if let Some(budget) = settings.budget {
            in_range(budget)
                .map_err(anyhow::Error::msg)
                .context("budget")?;
        }
        Ok(settings)
    }

    /// These, and where they say nothing, others.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            root: self.root.or(other.root),
            socket: self.socket.or(other.socket),
            server: self.server.or(other.server),
            server_run_dir: self.server_run_dir.or(other.server_run_dir),
            ufs: self.ufs.or(other.ufs),
            budget: self.budget.or(other.budget),
            mounts: self.mounts.or(other.mounts),
            trust_ufs: self.trust_ufs.or(other.trust_ufs),
        }
    }

    /// With defaults for what is missing.
    pub fn options(self) -> Options {
        let server = self.server.unwrap_or_else(|| SOCKET.into());
        Options {
            root: self.root.unwrap_or_else(|| ROOT.into()),
            socket: self.socket.unwrap_or_else(|| LISTEN.into()),
            server: Paths::new(&server, self.server_run_dir),
            ufs: self.ufs,
            budget: Duration::from_secs_f64(self.budget.unwrap_or(BUDGET)),
            how: Choices {
                native: self.mounts == Some(Mounts::Native),
                trust_ufs: self.trust_ufs == Some(true),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_counts_before_the_file() {
        let file = Settings::parse(
            "root = \"/f\"\nbudget = 7\nufs = \"/u\"\nmounts = \"native\"\ntrust_ufs = true\n",
        )
        .unwrap();
        let line = Settings {
            root: Some("/l".into()),
            ..Settings::default()
        };
        let options = line.or(file).options();
        assert_eq!(options.root, Path::new("/l"));
        assert_eq!(options.budget, Duration::from_secs(7));
        assert_eq!(options.ufs.as_deref(), Some(Path::new("/u")));
        assert!(options.how.native && options.how.trust_ufs);
        let options = Settings::default().options();
        assert_eq!(
            (options.root, options.how),
            (ROOT.into(), Choices::default())
        );
        for wrong in [
            "budget = 0",
            "bugdet = 3",
            "mounts = \"erofs\"",
            "root = 3",
            "x",
        ] {
            Settings::parse(wrong).unwrap_err();
        }
    }
}
