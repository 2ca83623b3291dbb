//! Why a registry did not do what was wanted, and what to do about it.

use super::http::Http;
use super::login::Login;
use crate::{ImageError, Problem};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Response, StatusCode};
use std::time::{Duration, SystemTime};

/// What is read of an answer that says no.
const MAX_REFUSAL: usize = 64 << 10;

/// Why something was not had.
#[derive(Debug)]
pub(super) enum Failure {
    /// No answer, or one that broke off.
    Connection(String),
    /// The registry does not let us in.
    Refused {
        /// Why, and what to do.
        why: String,
        /// The same in one word.
        problem: Problem,
    },
    /// Another answer than the wanted one.
    Status {
        code: StatusCode,
        /// What it says about it.
        said: String,
        /// How long it wants us to wait.
        wait: Option<Duration>,
    },
}

impl Failure {
    pub fn connection(error: &reqwest::Error) -> Self {
        Self::Connection(told(error))
    }

    /// Whether it may go well the next time.
    pub fn may_pass(&self) -> bool {
        match self {
            Self::Connection(_) => true,
            Self::Refused { .. } => false,
            Self::Status { code, .. } => {
                code.is_server_error() && *code != StatusCode::NOT_IMPLEMENTED
                    || *code == StatusCode::TOO_MANY_REQUESTS
                    || *code == StatusCode::REQUEST_TIMEOUT
            }
        }
    }

    /// Whether it is not there.
    pub fn is_absent(&self) -> bool {
        matches!(self, Self::Status { code, .. } if *code == StatusCode::NOT_FOUND)
    }
}

/// The pause before the next attempt, after `attempt` of them.
pub(super) fn pause(attempt: u32) -> Duration {
    Duration::from_millis(250 << attempt.min(6))
}

impl Http {
    /// What a failure is in one word.
    pub fn problem(&self, failure: &Failure) -> Problem {
        match failure {
            Failure::Connection(_) => Problem::Unreachable,
            Failure::Refused { problem, .. } => *problem,
            Failure::Status { code, .. } => match code.as_u16() {
                403 => self.login.problem().unwrap_or(Problem::Forbidden),
                404 => Problem::NotFound,
                _ => Problem::Other,
            },
        }
    }

    /// Whether a connection, of which `text` tells, was good until TLS was agreed upon, and
    /// broke off before there was ever an answer; nobody's certificate was shown.
    fn broke_off_at_once(&self, text: &str) -> bool {
        let established = ["client error (SendRequest)", "client error (Canceled)"]
            .iter()
            .any(|kind| text.contains(kind));
        established && !self.has_answered() && !self.shows_certificate()
    }

    /// What a failure means, and what to do about it.
    pub fn explain(&self, failure: &Failure) -> String {
        match failure {
            Failure::Connection(text) => {
                let hint = match self.base.scheme() {
                    "https" if text.contains("InvalidContentType") => {
                        "; it does not speak TLS: --plain-http, if you trust the network"
                    }
                    "https" if text.contains("UnknownIssuer") => {
                        "; if the registry's certificate is your own authority's, name that as \"ca\" in hosts.toml (see --hosts-dir), or install it on this machine (update-ca-certificates)"
                    }
                    // What servers say that got none, by version of TLS.
                    "https"
                        if ["CertificateRequired", "alert: BadCertificate"]
                            .iter()
                            .any(|alert| text.contains(alert)) =>
                    {
                        "; the registry wants a client's certificate: name it as \"client\" in hosts.toml (see --hosts-dir)"
                    }
                    // With TLS 1.3 a server looks at the client's certificate once the client is
                    // done already. What it says then may come too late to be seen: a broken
                    // connection is all there is.
                    "https" if self.broke_off_at_once(text) => {
                        "; it broke off right after TLS' handshake: if the registry wants a client's certificate, name it as \"client\" in hosts.toml (see --hosts-dir)"
                    }
                    _ if text.contains("proxy auth") => {
                        "; the proxy wants a login: put name and password into the variable (http://NAME:PASSWORD@HOST), or the registry into NO_PROXY"
                    }
                    _ if text.contains("tunnel") => {
                        "; the proxy is that of HTTPS_PROXY, HTTP_PROXY or ALL_PROXY: if the registry needs none, put it into NO_PROXY"
                    }
                    _ => "",
                };
                format!("{text}{hint}")
            }
            Failure::Refused { why, .. } => why.clone(),
            Failure::Status { code, said, wait } => {
                let number = code.as_u16();
                let what = match number {
                    403 => match &self.login {
                        Login::Anonymous { .. } => "the registry does not allow it without a login, or not at all: use docker login or skopeo login, or --username with --password-stdin".to_owned(),
                        Login::Password { user, .. } => format!("the registry does not allow it to user {user:?}: ask its owner for the right to pull"),
                        Login::IdentityToken(_) => "the registry does not allow it to your login: ask its owner for the right to pull".to_owned(),
                    },
                    407 => "the proxy wants a login: put name and password into HTTP_PROXY (http://NAME:PASSWORD@HOST), or the registry into NO_PROXY".to_owned(),
                    404 => "the registry does not have it: check the name and the tag or digest (some registries also say so of what you may not see)".to_owned(),
                    405 => "the registry does not do that: it is none, or of another kind".to_owned(),
                    429 => match wait {
                        Some(wait) => format!("too many requests: the registry wants {} s of patience; try again then, or with a login that may do more", wait.as_secs()),
                        None => "too many requests: try again later, or with a login that may do more".to_owned(),
                    },
                    500.. => "the registry itself has failed: try again later, or tell who runs it".to_owned(),
                    _ => "the registry gives an answer that is not understood".to_owned(),
                };
                match said.is_empty() {
                    true => format!("{what} ({number})"),
                    false => format!("{what} ({number}, it says {said:?})"),
                }
            }
        }
    }
}

impl Http {
    /// The error that a failure is when `what` was pushed.
    pub fn push_error(&self, what: &str, failure: &Failure) -> ImageError {
        let problem = match self.problem(failure) {
            // What is pushed is what is not there yet.
            Problem::NotFound => Problem::NoTarget,
            problem => problem,
        };
        let why = match failure {
            Failure::Status { code, .. } if code.as_u16() == 404 => {
                "there is no such repository, and it is not made by pushing: make it first, or name another (404)".to_owned()
            }
            Failure::Status { code, .. } if code.as_u16() == 405 => {
                "the registry takes no pushes: it is a mirror, or read-only (405)".to_owned()
            }
            failure => self.explain(failure).replace("the right to pull", "the right to push"),
        };
        ImageError::Push {
            registry: self.registry.clone(),
            what: what.to_owned(),
            why,
            problem,
        }
    }
}

/// What an answer says for people: the messages of an error as the distribution
/// specification has it, or its first line; without what `hide` takes from it, as some answer
/// with what they were told.
pub(super) async fn said(mut response: Response, hide: impl Fn(String) -> String) -> String {
    let mut body = Vec::new();
    while let Ok(Some(piece)) = response.chunk().await {
        body.extend_from_slice(&piece);
        if body.len() > MAX_REFUSAL {
            break;
        }
    }
    let text = String::from_utf8_lossy(&body);
    let json: serde_json::Value = serde_json::from_str(&text).unwrap_or_default();
    let messages = json["errors"].as_array().map(|errors| {
        let message = |error: &serde_json::Value| {
            let (code, message) = (error["code"].as_str(), error["message"].as_str());
            message
                .filter(|m| !m.is_empty())
                .or(code)
                .map(str::to_owned)
        };
        errors.iter().filter_map(message).collect::<Vec<_>>()
    });
    match messages {
        Some(messages) if !messages.is_empty() => first_line(&hide(messages.join("; "))),
        _ => first_line(&hide(text.into_owned())),
    }
}

/// How long an answer wants us to wait: seconds, or a moment.
pub(super) fn retry_after(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let moment = httpdate::parse_http_date(text).ok()?;
    let wait = moment.duration_since(SystemTime::now());
    Some(wait.unwrap_or_default())
}

/// What a connection's error says. What follows an address' question mark may be a
/// signature that lets in whoever has it, so that it stays untold.
pub(super) fn told(error: &reqwest::Error) -> String {
    let text = chain(error);
    match error.url() {
        Some(url) if url.query().is_some() => {
            let mut plain = url.clone();
            plain.set_query(None);
            text.replace(url.as_str(), plain.as_str())
        }
        _ => text,
    }
}

/// An error with everything below it: HTTP clients hide the reason deep down.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut below = error.source();
    while let Some(error) = below {
        let reason = error.to_string();
        if !text.contains(&reason) {
            text = format!("{text}: {reason}");
        }
        below = error.source();
    }
    text
}

pub(super) fn first_line(text: &str) -> String {
    let line = text.trim().lines().next().unwrap_or_default();
    line.chars().take(200).collect()
}
