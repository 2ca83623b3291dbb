//! What the ublk driver of this machine offers.

use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use super::control::Control;
use super::error::{UblkError, Unavailable};
use accel_sys::ublk::Features;

/// How long the driver may take to say what it can.
const BOUND: Duration = Duration::from_secs(10);

/// Asks the driver for its features, and whether they are enough.
///
/// On a thread of its own, because opening the control device of a driver that
/// hangs could itself hang.
pub fn probe() -> Result<Features, Unavailable> {
    let (answer, asked) = mpsc::sync_channel(1);
    thread::Builder::new()
        .name("ublk-probe".into())
        .spawn(move || {
            let _ = answer.send(Control::open().and_then(|control| usable(&control)));
        })
        .map_err(|source| Unavailable::Control { source })?;
    asked.recv_timeout(BOUND * 2).unwrap_or_else(|_| {
        Err(Unavailable::Probe(Box::new(UblkError::Ended {
            what: "probe",
        })))
    })
}

/// The driver's features, if they are enough.
pub(super) fn usable(control: &Control) -> Result<Features, Unavailable> {
    let features = control
        .features(BOUND)
        .map_err(|error| Unavailable::Probe(Box::new(error)))?;
    if !features.contains(Features::REQUIRED) {
        return Err(Unavailable::Lacks {
            missing: Features::REQUIRED.without(features),
        });
    }
    Ok(features)
}
