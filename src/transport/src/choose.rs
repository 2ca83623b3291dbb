//! Which transport to use here.

use std::fmt;
use std::str::FromStr;

use crate::fuse::{self, FuseError};
use crate::ublk::{self, Features, Unavailable};

/// What the operator asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Wanted {
    /// The best that works here.
    #[default]
    Auto,
    /// ublk or nothing.
    Ublk,
    /// FUSE or nothing.
    Fuse,
}

impl FromStr for Wanted {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Wanted::Auto),
            "ublk" => Ok(Wanted::Ublk),
            "fuse" => Ok(Wanted::Fuse),
            _ => Err(format!("{text:?} is no transport: auto, ublk or fuse")),
        }
    }
}

/// How bytes reach the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// Block devices `/dev/ublkbN`.
    Ublk,
    /// Files.
    Fuse,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Transport::Ublk => "ublk",
            Transport::Fuse => "fuse",
        })
    }
}

/// The transport that was chosen, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The transport.
    pub transport: Transport,
    /// For the log and the operator.
    pub reason: String,
}

/// Nothing that was asked for works here.
#[derive(Debug, thiserror::Error)]
pub enum NoTransport {
    /// ublk was asked for.
    #[error("the ublk transport does not work here: {0}")]
    Ublk(#[source] Unavailable),
    /// FUSE was asked for.
    #[error("the fuse transport does not work here: {0}")]
    Fuse(#[source] FuseError),
    /// Anything would have done.
    #[error("no transport works here; ublk: {ublk}; fuse: {fuse}")]
    Neither {
        /// Why not ublk.
        ublk: Unavailable,
        /// Why not FUSE.
        fuse: FuseError,
    },
}

/// Probes what is wanted, best first.
pub fn choose(wanted: Wanted) -> Result<Choice, NoTransport> {
    decide(wanted, ublk::probe, fuse::probe)
}

fn decide(
    wanted: Wanted,
    ublk: impl FnOnce() -> Result<Features, Unavailable>,
    fuse: impl FnOnce() -> Result<(), FuseError>,
) -> Result<Choice, NoTransport> {
    let with_ublk = |features, why: &str| Choice {
        transport: Transport::Ublk,
        reason: format!("{why}; the driver has {features}"),
    };
    let with_fuse = |reason| Choice {
        transport: Transport::Fuse,
        reason,
    };
    match wanted {
        Wanted::Ublk => ublk()
            .map(|features| with_ublk(features, "asked for"))
            .map_err(NoTransport::Ublk),
        Wanted::Fuse => fuse()
            .map(|()| with_fuse("asked for".to_owned()))
            .map_err(NoTransport::Fuse),
        Wanted::Auto => match ublk() {
            Ok(features) => Ok(with_ublk(features, "preferred")),
            Err(ublk) => match fuse() {
                Ok(()) => Ok(with_fuse(format!("ublk does not work here: {ublk}"))),
                Err(fuse) => Err(NoTransport::Neither { ublk, fuse }),
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    fn no_fuse() -> Result<(), FuseError> {
        Err(FuseError::Unavailable(io::ErrorKind::NotFound.into()))
    }

    #[test]
    fn auto_prefers_ublk_and_says_why_not() {
        let choice = decide(Wanted::Auto, || Ok(Features::REQUIRED), || unreachable!()).unwrap();
        assert_eq!(choice.transport, Transport::Ublk);
        assert!(choice.reason.contains("USER_COPY"), "{}", choice.reason);

        let choice = decide(Wanted::Auto, || Err(Unavailable::NoDriver), || Ok(())).unwrap();
        assert_eq!(choice.transport, Transport::Fuse);
        assert!(
            choice.reason.contains("modprobe ublk_drv"),
            "{}",
            choice.reason
        );

        let error = decide(Wanted::Auto, || Err(Unavailable::NoDriver), no_fuse).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("modprobe ublk_drv") && text.contains("modprobe fuse"),
            "{text}"
        );
    }

    #[test]
    fn what_is_asked_for_is_not_replaced() {
        let old = || {
            Err(Unavailable::Lacks {
                missing: Features::USER_COPY,
            })
        };
        let error = decide(Wanted::Ublk, old, || unreachable!()).unwrap_err();
        assert!(error.to_string().contains("lacks USER_COPY"), "{error}");
        let choice = decide(Wanted::Fuse, || unreachable!(), || Ok(())).unwrap();
        assert_eq!(choice.transport, Transport::Fuse);
        assert!(decide(Wanted::Fuse, || Ok(Features::REQUIRED), no_fuse).is_err());
    }
}
