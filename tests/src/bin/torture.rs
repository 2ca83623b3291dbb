//! `torture run`: the programs under a load that knows every byte, while everything
//! breaks. tools/torture runs it in the guest.

use std::path::PathBuf;
use std::process::ExitCode;

use accel_tests::torture::{self, Options, passthrough};
use accel_tests::{Setting, nfs};
use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Debug, Parser)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Tortures; the last line says what happened
    Run(Run),
    /// Stops an NFS server under readers, and damages what it has
    Nfs {
        #[command(flatten)]
        place: Place,
        /// How UFS is mounted
        #[arg(long, value_enum, default_value_t = Nfs::Hard)]
        mode: Nfs,
        /// For how many seconds the server is down
        #[arg(long, default_value_t = 60)]
        down: u64,
    },
    /// Converts the same layers from two NFS clients at once
    Leases {
        #[command(flatten)]
        place: Place,
        #[arg(long, default_value_t = 20)]
        rounds: u64,
    },
    /// Kills the daemon while UFS hangs in the kernel
    Stuck {
        #[command(flatten)]
        place: Place,
        #[arg(long, default_value_t = 8)]
        devices: u64,
    },
    /// Shows a directory on FUSE, for UFS that stalls
    #[command(hide = true)]
    Passthrough {
        backing: PathBuf,
        target: PathBuf,
        stall: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Place {
    /// Directory of the programs under test
    #[arg(long, value_name = "DIR")]
    bin: PathBuf,
    /// How images are exported
    #[arg(long, value_parser = ["ublk", "fuse"], default_value = "ublk")]
    transport: String,
    /// Where temporary files go
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    scratch: PathBuf,
}

impl Place {
    fn setting(self) -> anyhow::Result<Setting> {
        Ok(Setting {
            bin: self.bin.canonicalize()?,
            fixtures: PathBuf::new(),
            transport: self.transport,
            scratch: self.scratch.canonicalize()?,
        })
    }
}

#[derive(Debug, Args)]
struct Run {
    #[command(flatten)]
    place: Place,
    /// How long; up to four times as long if too little has happened by then
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// What happens follows from it, as far as time allows
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Images that are mounted and attached all the time
    #[arg(long, value_name = "NUMBER", default_value_t = 3)]
    devices: usize,
    /// Whether UFS is on NFS
    #[arg(long, value_enum, default_value_t = Nfs::Auto)]
    nfs: Nfs,
    /// Devices that end with their daemon: this has to find errors
    #[arg(long)]
    without_recovery: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Nfs {
    /// With a hard mount, if this machine can
    Auto,
    Hard,
    Soft,
    No,
}

fn main() -> anyhow::Result<ExitCode> {
    let run = match Arguments::parse().command {
        Command::Run(run) => run,
        Command::Nfs { place, mode, down } => {
            let mode = match mode {
                Nfs::Soft => nfs::Mode::Soft,
                _ => nfs::Mode::Hard,
            };
            let down = std::time::Duration::from_secs(down);
            torture::server::run(&place.setting()?, mode, down)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Stuck { place, devices } => {
            torture::stuck::run(&place.setting()?, devices.max(1))?;
            println!("stuck: all was done while UFS hung");
            return Ok(ExitCode::SUCCESS);
        }
        Command::Leases { place, rounds } => {
            torture::leases::run(&place.setting()?, rounds)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Passthrough {
            backing,
            target,
            stall,
        } => {
            passthrough::serve(&backing, &target, &stall)?;
            return Ok(ExitCode::SUCCESS);
        }
    };
    let setting = run.place.setting()?;
    let options = Options {
        seconds: run.seconds,
        seed: run.seed,
        devices: run.devices.max(1),
        nfs: match run.nfs {
            Nfs::Auto => nfs::is_possible().then_some(nfs::Mode::Hard),
            Nfs::Hard => Some(nfs::Mode::Hard),
            Nfs::Soft => Some(nfs::Mode::Soft),
            Nfs::No => None,
        },
        without_recovery: run.without_recovery,
    };
    println!(
        "torture: UFS is {}",
        match options.nfs {
            Some(nfs::Mode::Hard) => "on NFS, mounted hard",
            Some(nfs::Mode::Soft) => "on NFS, mounted soft",
            None => "not on NFS",
        }
    );
    Ok(match torture::run(&setting, &options)? {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    })
}
