//! How a command reaches registries.

use crate::output::say;
use accel_image::{Credentials, ImageError, OpenOptions};
use anyhow::{Context, ensure};
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

/// Options that all commands have which reach registries.
#[derive(Debug, clap::Args)]
pub struct RegistryArguments {
    /// Talk HTTP instead of HTTPS to the registry
    #[arg(long)]
    plain_http: bool,
    #[arg(
        long,
        value_name = "DIR",
        help = "Where hosts.toml files say how to reach registries: mirrors, authorities, client certificates, headers [default: /etc/containerd/certs.d, then certificates in /etc/docker/certs.d]"
    )]
    hosts_dir: Option<PathBuf>,
    /// The user's name for the registry, instead of the logins of docker, podman
    /// or skopeo
    #[arg(long, value_name = "NAME", requires = "password")]
    username: Option<String>,
    /// Read the password from standard input
    #[arg(long, group = "password", requires = "username")]
    password_stdin: bool,
    /// Read the password from a file
    #[arg(long, group = "password", requires = "username", value_name = "FILE")]
    password_file: Option<PathBuf>,
    /// Where the logins are: a file like docker's config.json, instead of the user's own
    #[arg(long, value_name = "FILE", conflicts_with = "username")]
    registry_config: Option<PathBuf>,
}

/// Longer than any token that serves as a password, in bytes.
const MAX_PASSWORD: u64 = 64 << 10;

impl RegistryArguments {
    /// What they mean, with the password read.
    pub fn options(&self) -> anyhow::Result<OpenOptions> {
        Ok(OpenOptions {
            credentials: self.credentials()?,
            login_file: self.registry_config.clone(),
            plain_http: self.plain_http,
            hosts: self.hosts_dir.clone(),
            ..OpenOptions::default()
        })
    }

    /// The file with the logins, if one is named.
    pub fn login_file(&self) -> Option<&Path> {
        self.registry_config.as_deref()
    }

    /// The credentials that the user gives here.
    fn credentials(&self) -> anyhow::Result<Option<Credentials>> {
        let Some(user) = self.username.clone() else {
            return Ok(None);
        };
        let mut text = String::new();
        match &self.password_file {
            Some(path) => File::open(path)
                .and_then(|file| file.take(MAX_PASSWORD).read_to_string(&mut text))
                .with_context(|| format!("cannot read the password from {path:?}"))?,
            None => io::stdin()
                .take(MAX_PASSWORD)
                .read_to_string(&mut text)
                .context("cannot read the password from standard input")?,
        };
        // The end of the line is not part of it.
        let password = text.strip_suffix('\n').unwrap_or(&text);
        let password = password.strip_suffix('\r').unwrap_or(password).to_owned();
        ensure!(!password.is_empty(), "the password is empty");
        Ok(Some(Credentials { user, password }))
    }
}

/// Tells programs, in a line of JSON, what a registry refuses, if that is why this failed;
/// people read the error itself. The registry is empty if it is none in particular.
pub fn tell_refusal<T>(done: &anyhow::Result<T>) -> io::Result<()> {
    let refusal = done.as_ref().err().and_then(|error| {
        let mut causes = error.chain().filter_map(|cause| cause.downcast_ref());
        causes.find_map(ImageError::refusal)
    });
    if let Some((registry, problem)) = refusal {
        let refused = serde_json::json!({"registry": registry, "problem": problem});
        say!("{}", serde_json::json!({"refused": refused}))?;
    }
    Ok(())
}
