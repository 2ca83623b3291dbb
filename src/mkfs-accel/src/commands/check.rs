//! `mkfs-accel check`: whether UFS can be used, and whether registries take the logins that there
//! are for them.

use crate::interrupt;
use crate::output::{complain, say};
use crate::registry::{RegistryArguments, tell_refusal};
use accel_image::{check_login, logins};
use accel_ufs::UfsError;
use accel_ufs::publish::Ufs;
use anyhow::ensure;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(
        value_name = "HOST[:PORT]",
        help = "The registries; may be given several times. Those that --registry-config has logins for are checked anyway"
    )]
    registries: Vec<String>,
    /// Write something to this shared file system and read it back, before registries are asked
    #[arg(long, value_name = "DIR")]
    ufs: Option<PathBuf>,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Print lines of JSON instead
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
    if let Some(path) = &arguments.ufs {
        let tried = try_ufs(path);
        if arguments.json {
            let error = tried.as_ref().err().map(ToString::to_string);
            let tried = serde_json::json!({"usable": error.is_none(), "error": error});
            say!("{}", serde_json::json!({"ufs": tried}))?;
        }
        tried?;
        if !arguments.json {
            say!("{}: can be written to, and read", path.display())?;
        }
    }
    let checked = check(arguments);
    if arguments.json {
        tell_refusal(&checked)?;
    }
    let registries = checked?;
    if arguments.json {
        say!("{}", serde_json::json!({"checked": registries}))?;
    }
    Ok(())
}

fn try_ufs(path: &Path) -> Result<(), UfsError> {
    let ufs = Ufs::open(path)?;
    interrupt::on_interrupt(ufs.closer());
    ufs.try_out()
}

/// Which were checked. The first that fails is the error; the others are told before it.
fn check(arguments: &Arguments) -> anyhow::Result<BTreeSet<String>> {
    let mut registries: BTreeSet<_> = arguments.registries.iter().cloned().collect();
    let options = arguments.registry.options()?;
    if let Some(path) = arguments.registry.login_file() {
        registries.extend(logins(path)?);
    }
    ensure!(
        !registries.is_empty() || arguments.ufs.is_some(),
        "there is nothing to check: name a registry, a file with logins (--registry-config), or --ufs"
    );
    let mut first = None;
    for registry in &registries {
        match check_login(registry, &options) {
            Ok(()) if arguments.json => {}
            Ok(()) => say!("{registry}: we are let in")?,
            Err(error) if first.is_none() => first = Some(error),
            Err(error) => complain!("{error}"),
        }
    }
    first.map_or(Ok(registries), |error| Err(error.into()))
}
