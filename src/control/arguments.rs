//! The arguments of one command, checked one by one in QEMU's words.
//!
//! Each getter takes its argument out, in the order in which the command's schema lists them; [`Arguments::finish`] then
//! complains about what is left. So a client that does several things wrong hears of the same one as from QEMU.

use serde_json::{Map, Value};

use super::errors::QmpError;

type Result<T> = std::result::Result<T, QmpError>;

/// The arguments of one command.
pub(super) struct Arguments(Map<String, Value>);

impl Arguments {
    pub(super) fn new(members: Map<String, Value>) -> Self {
        Arguments(members)
    }

    /// Fails if an argument is left that nobody asked for.
    pub(super) fn finish(self) -> Result<()> {
        match self.0.keys().next() {
            Some(name) => Err(QmpError::usage(format!("Parameter '{name}' is unexpected"))),
            None => Ok(()),
        }
    }

    pub(super) fn optional_string(&mut self, name: &str) -> Result<Option<String>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(mistyped(name, "string")),
        }
    }

    pub(super) fn string(&mut self, name: &str) -> Result<String> {
        self.optional_string(name)?.ok_or_else(|| missing(name))
    }

    pub(super) fn flag(&mut self, name: &str) -> Result<Option<bool>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(value)),
            Some(_) => Err(mistyped(name, "boolean")),
        }
    }

    /// QAPI `int`: 64 bits, signed.
    pub(super) fn integer(&mut self, name: &str) -> Result<Option<i64>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(value) => value.as_i64().map(Some).ok_or_else(|| mistyped(name, "integer")),
        }
    }

    /// QAPI `size` or `uint64`.
    pub(super) fn size(&mut self, name: &str) -> Result<Option<u64>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(value) => {
                value.as_u64().map(Some).ok_or_else(|| QmpError::usage(format!("Parameter '{name}' expects uint64")))
            }
        }
    }

    /// QAPI `uint32`.
    pub(super) fn uint32(&mut self, name: &str) -> Result<Option<u32>> {
        match self.0.remove(name) {
            None => Ok(None),
            Some(value) => {
                // A negative number is a 64 bit one to QEMU, and then does not fit 32.
                let kind = if value.is_i64() || value.is_u64() { "uint32_t" } else { "uint64" };
                let fits = value.as_u64().and_then(|number| u32::try_from(number).ok());
                fits.map(Some).ok_or_else(|| QmpError::usage(format!("Parameter '{name}' expects {kind}")))
            }
        }
    }

    /// One of the values of an enumeration, each with its word.
    pub(super) fn choice<T: Copy>(&mut self, name: &str, values: &[(&str, T)]) -> Result<Option<T>> {
        match self.optional_string(name)? {
            None => Ok(None),
            Some(word) => find(name, &word, values).map(Some),
        }
    }

    /// As [`Arguments::choice`], where it may not be missing.
    pub(super) fn required_choice<T: Copy>(&mut self, name: &str, values: &[(&str, T)]) -> Result<T> {
        self.choice(name, values)?.ok_or_else(|| missing(name))
    }

    /// A list of strings.
    pub(super) fn strings(&mut self, name: &str) -> Result<Option<Vec<String>>> {
        let items = match self.0.remove(name) {
            None => return Ok(None),
            Some(Value::Array(items)) => items,
            Some(_) => return Err(mistyped(name, "array")),
        };
        let texts = items.into_iter().enumerate().map(|(index, item)| match item {
            Value::String(text) => Ok(text),
            _ => Err(mistyped(&format!("{name}[{index}]"), "string")),
        });
        texts.collect::<Result<Vec<_>>>().map(Some)
    }
}

/// The value that `word` stands for.
pub(super) fn find<T: Copy>(name: &str, word: &str, values: &[(&str, T)]) -> Result<T> {
    let found = values.iter().find(|(known, _)| *known == word);
    found
        .map(|&(_, value)| value)
        .ok_or_else(|| QmpError::usage(format!("Parameter '{name}' does not accept value '{word}'")))
}

fn missing(name: &str) -> QmpError {
    QmpError::usage(format!("Parameter '{name}' is missing"))
}

fn mistyped(name: &str, expected: &str) -> QmpError {
    QmpError::usage(format!("Invalid parameter type for '{name}', expected: {expected}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn arguments(value: Value) -> Arguments {
        match value {
            Value::Object(members) => Arguments::new(members),
            other => panic!("{other}"),
        }
    }

    fn complaint<T>(result: Result<T>) -> String {
        match result {
            Ok(_) => "nothing".to_owned(),
            Err(error) => error.desc(),
        }
    }

    #[test]
    fn complaints_are_in_qemu_words() {
        assert_eq!(complaint(arguments(json!({})).string("id")), "Parameter 'id' is missing");
        assert_eq!(complaint(arguments(json!({"zz": 1})).finish()), "Parameter 'zz' is unexpected");
        let of = |value: Value| arguments(json!({ "a": value }));
        assert_eq!(complaint(of(json!(1)).string("a")), "Invalid parameter type for 'a', expected: string");
        assert_eq!(complaint(of(json!(1)).flag("a")), "Invalid parameter type for 'a', expected: boolean");
        assert_eq!(complaint(of(json!("1")).integer("a")), "Invalid parameter type for 'a', expected: integer");
        assert_eq!(complaint(of(json!(1.5)).integer("a")), "Invalid parameter type for 'a', expected: integer");
        assert_eq!(complaint(of(json!(1_u64 << 40)).uint32("a")), "Parameter 'a' expects uint32_t");
        assert_eq!(complaint(of(json!(-1)).uint32("a")), "Parameter 'a' expects uint32_t");
        assert_eq!(complaint(of(json!("x")).uint32("a")), "Parameter 'a' expects uint64");
        assert_eq!(complaint(of(json!(-1)).size("a")), "Parameter 'a' expects uint64");
        assert_eq!(
            complaint(of(json!("wat")).choice("a", &[("full", ())])),
            "Parameter 'a' does not accept value 'wat'"
        );
        assert_eq!(complaint(of(json!([1])).strings("a")), "Invalid parameter type for 'a[0]', expected: string");
    }
}
