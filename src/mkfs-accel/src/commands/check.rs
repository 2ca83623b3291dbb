//! `mkfs-accel check`: whether registries take the logins that there are for them.

use crate::output::say;
use crate::registry::{RegistryArguments, tell_refusal};
use accel_image::{check_login, logins};
use anyhow::ensure;
use std::collections::BTreeSet;

#[derive(Debug, clap::Args)]
pub struct Arguments {
    #[arg(
        value_name = "HOST[:PORT]",
        help = "The registries; may be given several times. Those that --registry-config has logins for are checked anyway"
    )]
    registries: Vec<String>,
    #[command(flatten)]
    registry: RegistryArguments,
    /// Print lines of JSON instead
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: &Arguments) -> anyhow::Result<()> {
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

/// Which were checked. The first that fails is the error; the others are told before it.
fn check(arguments: &Arguments) -> anyhow::Result<BTreeSet<String>> {
    let mut registries: BTreeSet<_> = arguments.registries.iter().cloned().collect();
    let options = arguments.registry.options()?;
    if let Some(path) = arguments.registry.login_file() {
        registries.extend(logins(path)?);
    }
    ensure!(
        !registries.is_empty(),
        "there is nothing to check: name a registry, or a file with logins (--registry-config)"
    );
    let mut first = None;
    for registry in &registries {
        match check_login(registry, &options) {
            Ok(()) if arguments.json => {}
            Ok(()) => say!("{registry}: we are let in")?,
            Err(error) if first.is_none() => first = Some(error),
            Err(error) => eprintln!("mkfs-accel: {error}"),
        }
    }
    first.map_or(Ok(registries), |error| Err(error.into()))
}
