//! Methods of Python's `str` that `minijinja-contrib` does not have.

use minijinja::value::{Value, from_args};
use minijinja::{Error, ErrorKind, State};

/// The method `name` of `value`: those here, or else the library's.
///
/// # Errors
/// What the method refuses, and a method that there is not.
pub(super) fn call(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    let Some(text) = value.as_str() else { return library(state, value, name, args) };
    match name {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(text.strip_prefix(prefix).unwrap_or(text).into())
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(text.strip_suffix(suffix).unwrap_or(text).into())
        }
        "partition" => {
            let separator = separator(args)?;
            let parts = text.split_once(separator).map(|(before, behind)| [before, separator, behind]);
            Ok(list(parts.unwrap_or([text, "", ""])))
        }
        "rpartition" => {
            let separator = separator(args)?;
            let parts = text.rsplit_once(separator).map(|(before, behind)| [before, separator, behind]);
            Ok(list(parts.unwrap_or(["", "", text])))
        }
        "rsplit" if args.first().is_some_and(|separator| separator.as_str().is_some()) => {
            let (_, most): (&str, Option<i64>) = from_args(args)?;
            // A negative number means all.
            let n_pieces =
                most.and_then(|most| usize::try_from(most).ok()).map_or(usize::MAX, |most| most.saturating_add(1));
            let mut pieces: Vec<&str> = text.rsplitn(n_pieces, separator(&args[..1])?).collect();
            pieces.reverse();
            Ok(list(pieces))
        }
        "index" => {
            let (wanted,): (&str,) = from_args(args)?;
            let at = text.find(wanted).map(|at| text[..at].chars().count());
            at.map(Value::from).ok_or_else(|| refused("index: substring not found"))
        }
        _ => library(state, value, name, args),
    }
}

fn separator(args: &[Value]) -> Result<&str, Error> {
    let (separator,): (&str,) = from_args(args)?;
    if separator.is_empty() { Err(refused("empty separator")) } else { Ok(separator) }
}

fn list<'a>(texts: impl IntoIterator<Item = &'a str>) -> Value {
    texts.into_iter().map(Value::from).collect()
}

fn refused(why: &'static str) -> Error {
    Error::new(ErrorKind::InvalidOperation, why)
}

fn library(state: &mut State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, args)
}
