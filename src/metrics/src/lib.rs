//! Metrics as Prometheus reads them: the text format, and just enough HTTP to answer a scrape.
//! What is counted is the programs' business.

mod http;
mod text;

pub use http::start;
pub use text::{Exposition, Histogram, Labels};
