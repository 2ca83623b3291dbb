//! Why a registry does not do what it is asked for, as one program tells it another.

use serde::{Deserialize, Serialize};

/// Why a registry does not do what it is asked for, in one word, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Problem {
    /// It wants a login, and the file that should have one cannot be read, or is none.
    NoLoginFile,
    /// It wants a login, and there is none for it.
    NoLogin,
    /// It refuses the login.
    Unauthorized,
    /// It takes the login, which may not do this.
    Forbidden,
    /// It does not have what is asked for.
    NotFound,
    /// It does not have the repository that is pushed to, and does not make it.
    NoTarget,
    /// It does not answer.
    Unreachable,
    /// Something else, or what a later version calls by another word: the message says what.
    #[serde(other)]
    Other,
}

impl Problem {
    /// Whether it is the same the next time, unless somebody does something about it.
    pub const fn lasts(self) -> bool {
        !matches!(self, Self::Unreachable | Self::Other)
    }
}
