//! Who we are to a registry: what the user says, else what `docker login` (or
//! `podman login`, `skopeo login`) has left.

use crate::{OpenOptions, Problem};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use docker_credential::{CredentialRetrievalError, DockerCredential};
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};

/// What a registry is told.
pub(super) enum Login {
    /// Nothing.
    Anonymous {
        /// Why no login was found where one should be; for the user if the registry
        /// then refuses us.
        trouble: Option<String>,
        /// Where one should be, if only one file counts, and that it has none if it could
        /// be read.
        file: Option<(PathBuf, bool)>,
    },
    /// A name and a password, or a token that serves as one.
    Password {
        user: String,
        password: String,
        /// Where they come from.
        from: &'static str,
    },
    /// What a token server gave at `docker login`, to be exchanged for tokens
    /// ("refresh token").
    IdentityToken(String),
}

fn read_file(path: &Path, key: &str) -> Result<DockerCredential, CredentialRetrievalError> {
    let file = File::open(path).map_err(|_| CredentialRetrievalError::ConfigReadError)?;
    docker_credential::get_credential_from_reader(BufReader::new(file), key)
}

impl Login {
    /// Who to be to `registry`. What the user gives on the command line counts if the
    /// host is one that they mean (`meant`), not for mirrors.
    pub fn new(registry: &str, options: &OpenOptions, meant: bool) -> Self {
        if let Some(credentials) = options.credentials.as_ref().filter(|_| meant) {
            return Self::Password {
                user: credentials.user.clone(),
                password: credentials.password.clone(),
                from: "--username",
            };
        }
        // Docker Hub's has an old name there.
        let key = match registry {
            "docker.io" => "https://index.docker.io/v1/",
            other => other,
        };
        let mut trouble = None;
        let mut file = options.login_file.clone().map(|path| (path, true));
        let found = match &options.login_file {
            // Only what is there: this user's own logins are another's business.
            Some(path) => vec![("the login file", read_file(path, key))],
            None => vec![
                ("docker", docker_credential::get_credential(key)),
                ("podman", docker_credential::get_podman_credential(registry)),
            ],
        };
        for (tool, found) in found {
            match found {
                Ok(DockerCredential::UsernamePassword(user, password)) => {
                    return Self::Password {
                        user,
                        password,
                        from: "your login",
                    };
                }
                Ok(DockerCredential::IdentityToken(token)) => return Self::IdentityToken(token),
                Err(
                    CredentialRetrievalError::ConfigNotFound
                    | CredentialRetrievalError::NoCredentialConfigured,
                ) => {}
                // Also said when there is no such file.
                Err(CredentialRetrievalError::ConfigReadError) => {
                    if let Some(path) = &options.login_file {
                        trouble = Some(format!("{} cannot be read", path.display()));
                        file = Some((path.clone(), false));
                    }
                }
                Err(CredentialRetrievalError::HelperFailure {
                    helper,
                    stdout,
                    stderr,
                }) => {
                    let said = format!("{} {}", stdout.trim(), stderr.trim());
                    // What all helpers say of a registry that they do not know.
                    if !said.contains("credentials not found") {
                        trouble = Some(format!(
                            "the credential helper {helper} of {tool} failed: {}",
                            super::failure::first_line(&said)
                        ));
                    }
                }
                Err(error) => {
                    trouble = Some(format!("{tool}'s configuration cannot be used: {error}"));
                }
            }
        }
        if let Some(trouble) = &trouble {
            tracing::warn!(registry, trouble, "going on without a login");
        }
        Self::Anonymous { trouble, file }
    }

    /// What it means that the registry does not let us in, and what to do.
    pub fn refused(&self) -> String {
        match self {
            Self::Anonymous {
                trouble: None,
                file: Some((path, _)),
            } => format!(
                "the registry wants a login, and {} has none for it",
                path.display()
            ),
            Self::Anonymous { trouble: None, .. } => "the registry wants a login: use docker login or skopeo login for this registry first, or --username with --password-stdin".to_owned(),
            Self::Anonymous {
                trouble: Some(trouble),
                ..
            } => format!("the registry wants a login, and {trouble}"),
            Self::Password { user, from, .. } => format!(
                "the registry refuses the credentials of user {user:?} (from {from}): check name and password, or log in again"
            ),
            Self::IdentityToken(_) => "the registry refuses the identity token of your login: it may have expired; log in again".to_owned(),
        }
    }

    /// `text` without what nobody else may see.
    pub fn hidden(&self, text: String) -> String {
        let secrets = match self {
            Self::Anonymous { .. } => Vec::new(),
            Self::Password { user, password, .. } => {
                vec![
                    STANDARD.encode(format!("{user}:{password}")),
                    password.clone(),
                ]
            }
            Self::IdentityToken(token) => vec![token.clone()],
        };
        let secrets = secrets.iter().filter(|secret| !secret.is_empty());
        secrets.fold(text, |text, secret| text.replace(secret.as_str(), "…"))
    }

    /// Why there is no login, if there is none.
    pub fn problem(&self) -> Option<Problem> {
        match self {
            Self::Anonymous {
                file: Some((_, false)),
                ..
            } => Some(Problem::NoLoginFile),
            Self::Anonymous { .. } => Some(Problem::NoLogin),
            Self::Password { .. } | Self::IdentityToken(_) => None,
        }
    }
}
